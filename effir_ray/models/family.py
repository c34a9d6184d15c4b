"""A family says where an architecture keeps its blocks, sublayers, norms and intermediate neurons.

Everything else in effir-ray (importance, surgery, gates, LoRA, accounting) goes through the accessors below,
so a new architecture is one new file: a ``Family(...)`` value, listed in ``_families`` at the end of this
file, and a layer class in ``models/modeling_effir.py`` that says how the block runs without a sublayer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from effir_ray.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

StreamCallback = Callable[[int, Literal["attention", "mlp", "block"], "Tensor", "Tensor"], None]

# A compressed checkpoint's model type is the backbone's with this prefix, see models/modeling_effir.py.
COMPRESSED_PREFIX = "effir_"


def sliding_window(config: PreTrainedConfig, index: int) -> int | None:
    """Most tokens that one token attends to in a layer, itself included; None without a window."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


@dataclass(frozen=True, kw_only=True)
class Family:
    """Dotted module names, relative to the headless model (``blocks``, ``final_norm``) or to one block (the
    rest).

    attention_parts / mlp_parts: everything that goes when the sublayer is dropped, its norms included.
    mlp_input: the module whose input is the residual stream between the two sublayers.
    post_norm: the norm follows the sum, so that a sublayer's last module gives the whole new stream.
    gate is None for an ungated MLP; gate == up when both are fused into one Linear (act rows first).
    first_block_differs: no other block of the architecture can stand in the first one's place.
    learned_positions: position embeddings are a table, of ``max_position_embeddings`` rows.
    packing: which pass of torch operators without padding computes the blocks (``encoding/packed.py``); None
    where attention has logit caps or layers of different windows, which the kernels of CPUs know and it not.
    """

    name: str
    model_types: tuple[str, ...]
    causal: bool
    pooling: Literal["last", "mean", "cls"]
    blocks: str
    attention_parts: tuple[str, ...]
    mlp_parts: tuple[str, ...]
    mlp_input: str
    attention_linears: tuple[str, ...]
    up_name: str
    gate_name: str | None
    down_name: str
    post_norm: bool = False
    first_block_differs: bool = False
    learned_positions: bool = False
    packing: Literal["pre-norm", "post-norm"] | None = None
    window: Callable[[PreTrainedConfig, int], int | None] = sliding_window
    # Arguments of the model class beside its configuration.
    build_options: Mapping[str, Any] = field(default_factory=dict)
    # Where a model with a pre-training head keeps the headless one, and tensors of heads that a retriever has
    # no use for, as prefixes of their names.
    body_prefix: str = "model."
    head_prefixes: tuple[str, ...] = ("lm_head.",)

    @property
    def fused(self) -> bool:
        """Gate and up projection are the two halves of one Linear."""
        return self.gate_name == self.up_name

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The blocks in order, dropped ones included: index = layer number of the uncompressed backbone."""
        found: Any = model.get_submodule(self.blocks)
        return found  # type: ignore[no-any-return]  # torch types get_submodule as nn.Module

    def attention(self, layer: nn.Module) -> nn.Module | None:
        """The attention module of a block (Linear layers inside), or None when it was dropped."""
        return part(layer, self.attention_parts[0])

    def mlp(self, layer: nn.Module) -> nn.Module | None:
        """What ``up``, ``gate`` and ``down`` take; None when the MLP was dropped.

        It is the MLP module, or the block itself where the MLP is not one module (BERT).
        """
        holder, _, _ = self.down_name.rpartition(".")
        if part(layer, holder) is None:
            return None
        return layer if self.post_norm else part(layer, self.mlp_parts[0])

    def down(self, mlp: nn.Module) -> nn.Linear:
        """Its input is the vector of intermediate neurons: gates and statistics hook there."""
        return self._linear(mlp, self.down_name)

    def up(self, mlp: nn.Module) -> nn.Linear:
        """Rows are neurons; for a fused MLP the second half of the rows is the up projection."""
        return self._linear(mlp, self.up_name)

    def gate(self, mlp: nn.Module) -> nn.Linear | None:
        """None for an ungated MLP; for a fused one the same Linear as ``up`` (first half of the rows)."""
        return None if self.gate_name is None else self._linear(mlp, self.gate_name)

    def _linear(self, mlp: nn.Module, name: str) -> nn.Linear:
        inside = name if self.post_norm else name.partition(".")[2]
        found: Any = mlp.get_submodule(inside)
        return found  # type: ignore[no-any-return]  # torch types get_submodule as nn.Module

    def width(self, layer: nn.Module) -> int:
        """Intermediate neurons of a block: 0 when its MLP was dropped."""
        mlp = self.mlp(layer)
        return 0 if mlp is None else self.down(mlp).in_features

    def linears(self, model: nn.Module) -> list[tuple[str, nn.Linear]]:
        """(full name, module) of every Linear in the blocks: what LoRA, sparsity and quantisation act on."""
        from torch.nn import Linear

        prefix = self.blocks + "."
        return [
            (name, module)
            for name, module in model.named_modules()
            if name.startswith(prefix) and isinstance(module, Linear)
        ]

    @contextmanager
    def watch(self, model: nn.Module, callback: StreamCallback) -> Iterator[None]:
        """While active, every forward calls ``callback(layer, kind, x, x + F(x))`` in order of computation.

        Both tensors are the residual stream, (batch, tokens, hidden); for post-norm families the second one
        is the normalised sum. Dropped sublayers are not reported; kind "block" is reported for every block.
        """
        handles: list[Any] = []
        try:
            for index, layer in enumerate(self.layers(model)):
                handles += self._watch_layer(index, layer, callback)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch_layer(self, index: int, layer: nn.Module, callback: StreamCallback) -> list[Any]:
        stream: dict[str, Tensor] = {}
        has_attention, mlp_input = self.attention(layer) is not None, part(layer, self.mlp_input)

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream["in"] = args[0] if args else kwargs["hidden_states"]

        def on_middle(module: nn.Module, args: tuple[Any, ...]) -> None:
            stream["middle"] = args[0]

        def on_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            middle = stream.get("middle", output)
            if has_attention:
                callback(index, "attention", stream["in"], middle)
            if mlp_input is not None:
                callback(index, "mlp", middle, output)
            callback(index, "block", stream["in"], output)
            stream.clear()

        handles = [
            layer.register_forward_pre_hook(on_input, with_kwargs=True),
            layer.register_forward_hook(on_output),
        ]
        if mlp_input is not None:
            handles.append(mlp_input.register_forward_pre_hook(on_middle))
        return handles


def part(layer: nn.Module, name: str) -> nn.Module | None:
    """The submodule at a dotted name, or None when it (or what holds it) was dropped."""
    current: Any = layer
    for piece in name.split("."):
        current = getattr(current, piece, None)
        if current is None:
            return None
    return current  # type: ignore[no-any-return]  # attributes of nn.Module are untyped


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    modules = ("llama", "gemma", "bert", "modernbert")
    return tuple(import_module(f"effir_ray.models.{name}").FAMILY for name in modules)


def get(model_type: str) -> Family:
    """The family of a Hugging Face ``model_type`` (that of a compressed checkpoint included)."""
    base = model_type.removeprefix(COMPRESSED_PREFIX)
    for family in families():
        if base in family.model_types:
            return family
    known = ", ".join(kind for family in families() for kind in family.model_types)
    raise InputError(
        f"model type '{model_type}' is not supported; supported: {known}. To add one, describe it in a new "
        "file beside effir_ray/models/llama.py and list it in family.families()"
    )
