"""Backbones: where each architecture keeps its sublayers, and loading models as retrievers."""
