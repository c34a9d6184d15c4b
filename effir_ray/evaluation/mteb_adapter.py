"""Any effir-ray model as a model that ``mteb`` can evaluate.

    import mteb
    from effir_ray.evaluation.mteb_adapter import MtebModel

    mteb.evaluate(MtebModel("minilm-l6"), mteb.get_tasks(tasks=["SciFact"]))

Needs the package ``mteb`` (version 2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from effir_ray.encoding.encoder import Encoder, as_encoder
from effir_ray.models.retriever import Retriever

if TYPE_CHECKING:
    from mteb.models import ModelMeta

Floats = npt.NDArray[np.float32]


class MtebModel:
    """Implements mteb's ``EncoderProtocol``; prompts, lengths and pooling are the model's own."""

    def __init__(self, model: str | Path | Retriever | Encoder) -> None:
        """``model`` is a name, a checkpoint folder, a loaded retriever or an encoder."""
        self._encoder = as_encoder(model)

    def encode(
        self, inputs: Iterable[Mapping[str, Sequence[str]]], *, prompt_type: Any = None, **_: Any
    ) -> Floats:
        """Embeddings (n, d) of the texts in ``inputs``, batches with a ``text`` column.

        ``prompt_type`` "query" encodes as a query, everything else as a document. Titles were joined
        in by mteb; its other arguments (the task, batch sizes) have no influence here.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        return self._encoder.encode(texts, "query" if prompt_type == "query" else "document")

    def similarity(self, embeddings1: npt.ArrayLike, embeddings2: npt.ArrayLike) -> Floats:
        """Inner products of (n, d) and (m, d) as (n, m): what retrieval ranks by."""
        first, second = np.atleast_2d(np.asarray(embeddings1)), np.atleast_2d(np.asarray(embeddings2))
        return np.asarray(first @ second.T, dtype=np.float32)

    def similarity_pairwise(self, embeddings1: npt.ArrayLike, embeddings2: npt.ArrayLike) -> Floats:
        """Inner products of the rows of (n, d) and (n, d) as (n,)."""
        products: Floats = np.asarray(embeddings1, np.float32) * np.asarray(embeddings2, np.float32)
        return np.asarray(products.sum(axis=1), dtype=np.float32)

    @cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """What mteb files the results under."""
        from mteb.models import ModelMeta
        from mteb.models.model_meta import ScoringFunction

        retriever = self._encoder.retriever
        name = re.sub(r"[^\w.-]+", "-", Path(retriever.name).name) or "model"
        return ModelMeta.create_empty(
            {
                "name": f"effir-ray/{name}",
                "n_parameters": sum(weights.numel() for weights in retriever.model.parameters()),
                "embed_dim": self._encoder.dimension,
                "max_tokens": retriever.spec.max_length,
                "similarity_fn_name": ScoringFunction.DOT_PRODUCT,
            }
        )
