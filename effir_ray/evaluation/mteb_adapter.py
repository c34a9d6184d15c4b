"""mteb's own evaluation of any effir-ray model.

    from effir_ray.evaluation.mteb_adapter import MtebModel, run_mteb

    run_mteb("minilm-l6", ["SciFact"], "results")                  # as effir-ray mteb does
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

from effir_ray.data.datasets import load_dataset, official_name
from effir_ray.encoding.encoder import Encoder, as_encoder
from effir_ray.errors import InputError
from effir_ray.models.folder import read_own
from effir_ray.models.names import backbone_fingerprint, resolve
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import Retriever

if TYPE_CHECKING:
    from mteb import AbsTask
    from mteb.models import ModelMeta

Floats = npt.NDArray[np.float32]


def run_mteb(
    model: str | Path, tasks: Sequence[str], out: Path | str, *, data: Path | str | None = None
) -> dict[str, float]:
    """Task -> main score, by ``mteb.evaluate``; its files lie in ``out``/results as in mteb's repository of
    results, and what is there already is not done again.

    ``data``: a folder of BEIR folders, of which those of the tasks' names (``scifact`` for SciFact) are used
    in place of downloads. Raises InputError for an unknown task, for one that ``data`` has no folder or not
    the split of, and when mteb is not installed.
    """
    try:
        import mteb
    except ImportError:
        raise InputError("this needs the package mteb: pip install 'effir-ray[mteb]'") from None
    try:
        chosen = list(mteb.get_tasks(tasks=list(tasks)))
    except (KeyError, ValueError) as error:
        reason = " ".join(str(error.args[0]).split()).removeprefix("KeyError: ")
        raise InputError(f"--task: {reason}") from None
    if not chosen:
        raise InputError("give at least one task, for example --task SciFact")
    for task in chosen if data is not None else ():
        _fill(task, Path(data or ""))
    cache = mteb.ResultCache(Path(out))
    found = mteb.evaluate(MtebModel(model), chosen, cache=cache, show_progress_bar=False)
    return {result.task_name: float(result.get_score()) for result in found.task_results}


_NAMES = {
    "fiqa2018": "fiqa",
    "treccovid": "trec-covid",
    "quoraretrieval": "quora",
    "climatefever": "climate-fever",
    "touche2020": "webis-touche2020",
}
"""mteb's name of a task in small letters -> BEIR's of its data, where they differ."""


def _fill(task: AbsTask, place: Path) -> None:
    """Give a retrieval task its texts and judgements from ``place``; it would otherwise download them."""
    name = task.metadata.name.lower()
    folder = place / _NAMES.get(name, official_name(name))
    if not folder.is_dir():
        raise InputError(f"--data: {folder} is not there, which the task {task.metadata.name} is to use")
    data = load_dataset(folder)
    splits = list(task.metadata.eval_splits)
    missing = [split for split in splits if split not in data.splits]
    if missing:
        raise InputError(f"{folder}: the task {task.metadata.name} needs judgements of split {missing[0]}")
    documents = {
        document.id: {"title": document.title, "text": document.text}
        for document in data.corpus.iter_documents()
    }
    task.corpus = dict.fromkeys(splits, documents)
    task.queries = {split: data.queries(split) for split in splits}
    task.relevant_docs = {split: data.qrels(split) for split in splits}
    task.data_loaded = True


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
        if prompt_type == "query":
            return self._encoder.encode(texts, "query", progress="Encoding queries")
        return self._encoder.encode(texts, "document", progress="Encoding documents")

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
        weights = list(retriever.model.parameters())
        embeddings = retriever.model.get_input_embeddings().weight
        name = re.sub(r"[^\w.-]+", "-", Path(retriever.name).name) or "model"
        return ModelMeta.create_empty(
            {
                "name": f"effir-ray/{name}",
                "revision": backbone_fingerprint(retriever.name)[:40],
                "n_parameters": sum(part.numel() for part in weights),
                "n_embedding_parameters": embeddings.numel(),
                "memory_usage_mb": round(sum(part.nbytes for part in weights) / 2**20),
                "framework": ["PyTorch", "safetensors"],
                "adapted_from": _backbone(retriever.name),
                "experiment_kwargs": _compression(retriever.plan),
                "embed_dim": self._encoder.dimension,
                "max_tokens": retriever.spec.max_length,
                "similarity_fn_name": ScoringFunction.DOT_PRODUCT,
            }
        )


def _backbone(name: str) -> str | None:
    """By what name the model that this one was made of is known; None for one that only a path leads to."""
    path = resolve(name).path
    own = read_own(path) if path is not None and path.is_dir() else None
    known = own is not None and own.backbone is not None and not Path(own.backbone).exists()
    return own.backbone if own is not None and known else None


def _compression(plan: Plan) -> dict[str, Any] | None:
    """What mteb names experiments by: how many sublayers stay, neurons of narrowed MLPs, and dimensions."""
    if plan == Plan.full(len(plan.layers)):
        return None
    widths = [len(layer.neurons) for layer in plan.layers if layer.mlp and layer.neurons is not None]
    return {
        "blocks": len(plan.layers),
        "attention": sum(layer.attention for layer in plan.layers),
        "mlp": sum(layer.mlp for layer in plan.layers),
        **({"neurons_of_narrowed": sum(widths)} if widths else {}),
        **({"dimension": plan.dimension} if plan.dimension else {}),
    }
