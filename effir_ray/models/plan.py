"""A plan says, for every layer, whether attention stays and which MLP neurons stay. Pure data."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from effir_ray.config import Config, says_nothing


class LayerPlan(Config):
    """``neurons``: sorted indices of the kept intermediate neurons; None keeps all of them."""

    attention: bool = True
    mlp: bool = True
    neurons: tuple[int, ...] | None = None


class Plan(Config):
    """One entry a layer of the uncompressed backbone; a dropped block keeps its (empty) place.

    ``vocabulary``: how many tokens stay of the backbone's; None keeps all. Which ones, the tokenizer knows:
    ``compression.vocabulary`` takes the others out, not surgery. ``dimension``: length of the embeddings
    where a projection makes them shorter than hidden states; None: it does not.
    """

    layers: tuple[LayerPlan, ...]
    vocabulary: int | None = Field(default=None, ge=1, exclude_if=says_nothing)
    dimension: int | None = Field(default=None, ge=1, exclude_if=says_nothing)

    @classmethod
    def full(cls, n_layers: int) -> Plan:
        return cls(layers=(LayerPlan(),) * n_layers)

    def per_layer_config(self) -> dict[str, dict[str, Any]]:
        """transformers' own schema: ``{"2": {"skip": ["mlp"]}, "3": {"intermediate_size": 1024}}``."""
        result: dict[str, dict[str, Any]] = {}
        for index, layer in enumerate(self.layers):
            entry: dict[str, Any] = {}
            skip = [name for name, kept in (("attention", layer.attention), ("mlp", layer.mlp)) if not kept]
            if skip:
                entry["skip"] = skip
            if layer.mlp and layer.neurons is not None:
                entry["intermediate_size"] = len(layer.neurons)
            if entry:
                result[str(index)] = entry
        return result
