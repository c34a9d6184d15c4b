"""A retriever: a headless model, its tokenizer, and how one embedding a text comes out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effir_ray.errors import InputError
from effir_ray.models import family as families
from effir_ray.models import loading
from effir_ray.models.folder import RetrieverSpec, TextKind
from effir_ray.models.plan import Plan
from effir_ray.models.projection import projection_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Retriever", "RetrieverSpec", "load_retriever"]


@dataclass
class Retriever:
    """``model(input_ids, attention_mask)`` gives ``.last_hidden_state`` (batch, tokens, hidden).

    ``plan`` has one entry a layer of the uncompressed backbone; for an uncompressed model it keeps
    everything. The tokenizer itself appends EOS where ``spec.append_eos`` says so, after truncation. Where
    ``model.projection`` is there, embeddings are what it makes of pooled hidden states.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    spec: RetrieverSpec
    plan: Plan
    name: str

    @property
    def family(self) -> families.Family:
        return families.get(self.model.config.model_type)

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        projection = projection_of(self.model)
        return int(self.model.config.hidden_size if projection is None else projection.out_features)

    def tokenize(
        self, texts: Sequence[str], kind: TextKind, max_length: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text: prompt + text, cut so that special tokens (EOS) stay; no padding.

        Never empty: a text without any token, as an empty document of a model that appends none, is one EOS.
        Raises InputError for a token that the model does not know, and for a text that is longer than its
        table of positions.
        """
        prompt = self.spec.query_prompt if kind == "query" else self.spec.document_prompt
        if not texts:
            return []
        encoded = self.tokenizer(
            [prompt + text for text in texts],
            truncation=True,
            max_length=max_length or self.spec.max_length,
            return_attention_mask=False,
        )
        ending = self.tokenizer.eos_token_id
        tokens = [list(ids) or [0 if ending is None else ending] for ids in encoded["input_ids"]]
        # Not when loading: some tokenizers list tokens of images and tools that no text ever becomes.
        largest, known = max(map(max, tokens)), self.model.config.vocab_size
        if largest >= known:
            raise InputError(
                f"{self.name}: its tokenizer gives token {largest}, and the model has embeddings of {known}; "
                "expected the tokenizer that belongs to the model"
            )
        longest, positions = max(map(len, tokens)), self.model.config.max_position_embeddings
        if self.family.learned_positions and longest > positions:
            raise InputError(
                f"{self.name}: a text has {longest} tokens, and the model has positions for {positions}; "
                f"expected a max_length of at most {positions}"
            )
        return tokens

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens, hidden), (batch, tokens) -> (batch, dimension). Padding may be on either side."""
        mask = attention_mask.bool()
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        if self.spec.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        elif self.spec.pooling == "last":
            positions = torch.arange(mask.shape[1], device=mask.device)
            pooled = hidden[rows, (positions * mask).argmax(dim=1)]
        else:
            pooled = hidden[rows, mask.int().argmax(dim=1)]
        return self.finish(pooled)

    def finish(self, pooled: Tensor) -> Tensor:
        """(batch, hidden) -> (batch, dimension): embeddings of pooled hidden states."""
        projection = projection_of(self.model)
        projected: Tensor = pooled if projection is None else projection(pooled)
        return torch.nn.functional.normalize(projected, dim=-1) if self.spec.normalize else projected


def load_retriever(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    first_blocks: int | None = None,
) -> Retriever:
    """Load a backbone or a checkpoint by name, see ``registry.resolve`` for what names there are.

    ``dtype``: "auto" keeps the type that the weights are stored in. ``first_blocks`` keeps only the first
    blocks, which then are the backbone's full depth. Raises InputError for an unknown name or architecture,
    and for any tensor that is missing or left over, naming it.
    """
    loaded = loading.load(
        str(name_or_path),
        dtype=getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype,
        trust_remote_code=trust_remote_code,
        first_blocks=first_blocks,
    )
    model = loaded.model.to(torch.device(device)).eval()
    return Retriever(model, loaded.tokenizer, loaded.spec, loaded.plan, str(name_or_path))
