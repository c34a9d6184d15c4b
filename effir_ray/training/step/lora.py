"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / r) B A x, with W frozen.

Adapters sit on every Linear of every block that surgery left, whatever its width, and are merged into the
weights before saving, so a trained checkpoint is an ordinary one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from effir_ray.models.retriever import Retriever
    from effir_ray.training.config import LoraConfig


class LoraLinear(nn.Module):
    """A Linear (out, in) with an adapter: A (r, in) starts random, B (out, r) at 0: no change yet."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base
        self.scaling = config.alpha / config.r
        options: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(config.r, base.in_features, **options))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.r, **options))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as the paper's code and PEFT

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        update = nn.functional.linear(nn.functional.linear(inputs, self.lora_a), self.lora_b)
        outputs: Tensor = self.base(inputs)
        return outputs + self.scaling * update

    def merged(self) -> Tensor:
        """(out, in): the weight with the update added, summed in float32."""
        update = self.scaling * (self.lora_b.float() @ self.lora_a.float())
        return (self.base.weight.float() + update).to(self.base.weight.dtype)


def add_lora(retriever: Retriever, config: LoraConfig) -> None:
    """Freeze the model, a projection of its embeddings too, and put an adapter on every Linear inside its
    blocks, in place."""
    retriever.model.requires_grad_(False)
    for name, linear in retriever.family.linears(retriever.model):
        _replace(retriever.model, name, LoraLinear(linear, config))


@torch.no_grad()
def plain_weights(
    model: nn.Module, whole: Callable[[list[nn.Parameter]], Any], *, keep: bool = True
) -> dict[str, Tensor]:
    """Every parameter of ``model`` as it would be without adapters: updates merged, names as before.

    ``whole`` is a context in which the given parameters are complete (ZeRO-3 keeps a part on each rank): one
    module at a time, so that the whole model never has to fit beside the training state. Copies, on the CPU.
    ``keep``: False on a rank that takes part but has no use for them; it copies nothing and gets nothing.
    """
    weights: dict[str, Tensor] = {}
    adapted: set[str] = set()
    for prefix, module in model.named_modules():
        parameters = list(module.parameters(recurse=isinstance(module, LoraLinear)))
        if not parameters or prefix.removesuffix(".base") in adapted:
            continue
        if isinstance(module, LoraLinear):
            adapted.add(prefix)
        with whole(parameters):
            if not keep:
                continue
            if isinstance(module, LoraLinear):
                values = {"weight": module.merged()}
                if module.base.bias is not None:
                    values["bias"] = module.base.bias
            else:
                values = dict(module.named_parameters(recurse=False))
            for name, value in values.items():
                weights[f"{prefix}.{name}"] = value.detach().to("cpu", copy=True)
    return weights


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
