"""Importance of every sublayer: what a criterion measured, as plain data."""

from __future__ import annotations

from pydantic import model_validator

from effir_ray.config import Config


class ImportanceScores(Config):
    """One number a layer in each of three separate groups; higher means keep (paper, section 3.1)."""

    criterion: str
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    block: tuple[float, ...]

    @model_validator(mode="after")
    def _one_a_layer(self) -> ImportanceScores:
        if not len(self.attention) == len(self.mlp) == len(self.block):
            raise ValueError("attention, mlp and block need one score a layer each")
        return self
