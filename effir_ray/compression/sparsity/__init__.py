"""Zeros inside matrices: what the paper compares EffiR with.

Read ``methods`` (one matrix: patterns, magnitude, Wanda, SparseGPT), then ``sparsify`` (a whole retriever).
"""
