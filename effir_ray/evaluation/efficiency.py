"""How fast, how large and how spread out: efficiency figures of encoders, measured side by side.

All models are measured in turn within every round, so that whatever else the machine does hits them alike;
reported are medians over rounds, and speed-ups are ratios taken inside a round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from effir_ray.config import Config
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.encoding.encoder import Encoder, as_encoder
from effir_ray.encoding.gemm_peak import gemm_peak, seconds_of
from effir_ray.errors import InputError
from effir_ray.evaluation.index import exact_search
from effir_ray.models.accounting import flops
from effir_ray.progress import progress

_SEARCH_DEPTH = 100


class Efficiency(Config):
    """One model's figures. ``*_speedup`` is relative to the reference, ``*_spread`` its range over rounds.

    query_ms_*: latency of one query alone, tokenisation included. search_ms: exact search of one query over
    the measured documents, k = 100. document_ms, documents_per_s, tokens_per_s: throughput on all documents
    together. mfu: model FLOPs a second over the highest ``gemm_peak`` of the run. peak_memory_bytes: the
    weights of model and encoder and what encoding adds to them, on the GPU or in the process. isotropy: mean
    cosine between different documents (0 is best spread, near 1 is collapsed).
    """

    query_ms_p50: float
    query_ms_p95: float
    search_ms: float
    documents_per_s: float
    tokens_per_s: float
    document_ms: float
    query_speedup: float
    query_speedup_spread: tuple[float, float]
    document_speedup: float
    document_speedup_spread: tuple[float, float]
    mfu: float
    peak_memory_bytes: int
    isotropy: float


def measure(
    models: Sequence[str | Path],
    dataset: str | Path | Dataset,
    *,
    queries: int = 20,
    documents: int = 64,
    rounds: int = 5,
) -> dict[str, Efficiency]:
    """Figures of models, given by name or folder, on the first texts of ``dataset``; speed-ups are relative
    to the first model.

    All models are in memory together. Raises InputError for a model that is given twice, and for what
    ``load_dataset``, ``load_retriever`` and ``measure_efficiency`` refuse.
    """
    names = [str(model) for model in models]
    if len(set(names)) < len(names):
        raise InputError(f"models are {', '.join(names)}; give every model once")
    data = dataset if isinstance(dataset, Dataset) else load_dataset(dataset)
    return measure_efficiency(
        {name: as_encoder(name) for name in names},
        list(data.all_queries.values())[: max(0, queries)],
        [document.document_text for document in data.corpus.iter_documents(0, max(0, documents))],
        rounds=rounds,
        reference=names[0] if names else "",
    )


def measure_efficiency(
    models: Mapping[str, Encoder],
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    rounds: int = 5,
    reference: str,
    query_max_length: int | None = None,
    document_max_length: int | None = None,
) -> dict[str, Efficiency]:
    """Figures of every model, by name; ``reference`` names the one that speed-ups are relative to.

    Texts are cut to ``*_max_length`` tokens, by default to what each model's own settings say.
    Raises InputError for a reference that is not among the models and for empty inputs.
    """
    if reference not in models:
        raise InputError(f"reference '{reference}' is not measured; measured: {', '.join(models)}")
    if not queries or not documents or rounds < 1:
        raise InputError("measuring needs at least one query, one document and one round")
    cut = {"query": query_max_length, "document": document_max_length}
    runs = {name: _Meter(encoder, queries, documents, cut) for name, encoder in models.items()}
    names = list(runs)
    with progress("Measuring", total=rounds * len(names), unit="passes") as bar:
        for number in range(rounds):
            shift = number % len(names)  # nobody always runs after the same neighbour
            for name in names[shift:] + names[:shift]:
                runs[name].round()
                bar.advance()
    # A peak is what a machine can do at best: other work can only have lowered what was measured of it.
    peaks: dict[object, float] = {}
    for run in runs.values():
        peaks[run.place] = max(run.peak, peaks.get(run.place, 0.0))
    return {name: run.figures(runs[reference], peaks[run.place]) for name, run in runs.items()}


class _Meter:
    """One model's measurements, a row a round."""

    def __init__(
        self,
        encoder: Encoder,
        queries: Sequence[str],
        documents: Sequence[str],
        cut: Mapping[str, int | None],
    ) -> None:
        self._queries, self._documents = queries, documents
        self._encode_query = partial(encoder.encode, kind="query", max_length=cut["query"])
        self._encode_document = partial(encoder.encode, kind="document", max_length=cut["document"])
        retriever = encoder.retriever
        lengths = [len(ids) for ids in retriever.tokenize(documents, "document", cut["document"])]
        self._tokens = sum(lengths)
        by_length = {n: flops(retriever.model.config, retriever.plan, n) for n in set(lengths)}
        self._flops = sum(by_length[n] for n in lengths)
        self._embeddings, self._memory = peak_memory(
            encoder, documents, max_length=cut["document"]
        )  # warms up
        for query in queries:  # a GPU records a pass for every class of lengths at its first text
            self._encode_query([query])
        self._search()  # the first one loads a library
        self._query_seconds: list[list[float]] = []
        self._search_seconds: list[float] = []
        self._document_seconds: list[float] = []
        model = retriever.model
        self.place = model.device, model.dtype
        self.peak = 0.0  # FLOP/s, the highest of all rounds

    def round(self) -> None:
        self.peak = max(self.peak, gemm_peak(*self.place))
        alone = [seconds_of(partial(self._encode_query, [query])) for query in self._queries]
        self._query_seconds.append(alone)
        seconds = seconds_of(partial(self._encode_document, self._documents))
        self._document_seconds.append(seconds)
        self._search_seconds.append(seconds_of(self._search))

    def _search(self) -> object:
        return exact_search(self._embeddings[:1], self._embeddings, k=_SEARCH_DEPTH)

    def figures(self, reference: _Meter, peak: float) -> Efficiency:
        latencies = np.median(self._query_seconds, axis=0)  # (queries,): the median over rounds of each
        seconds = float(np.median(self._document_seconds))
        query_ratios = np.sum(reference._query_seconds, axis=1) / np.sum(self._query_seconds, axis=1)
        document_ratios = np.array(reference._document_seconds) / np.array(self._document_seconds)
        return Efficiency(
            query_ms_p50=1000 * float(np.quantile(latencies, 0.5)),
            query_ms_p95=1000 * float(np.quantile(latencies, 0.95)),
            search_ms=1000 * float(np.median(self._search_seconds)),
            documents_per_s=len(self._documents) / seconds,
            tokens_per_s=self._tokens / seconds,
            document_ms=1000 * seconds / len(self._documents),
            query_speedup=float(np.median(query_ratios)),
            query_speedup_spread=(float(query_ratios.min()), float(query_ratios.max())),
            document_speedup=float(np.median(document_ratios)),
            document_speedup_spread=(float(document_ratios.min()), float(document_ratios.max())),
            mfu=self._flops / seconds / peak,
            peak_memory_bytes=self._memory,
            isotropy=isotropy(self._embeddings),
        )


def isotropy(embeddings: npt.NDArray[np.float32]) -> float:
    """Mean cosine over all pairs of different rows of (n, d), in one pass: (|sum u|^2 - n) / (n (n - 1))."""
    n = len(embeddings)
    if n < 2:
        raise InputError(f"isotropy needs at least 2 embeddings, found {n}")
    units = embeddings.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    return float((np.square(units.sum(axis=0)).sum() - n) / (n * (n - 1)))


def peak_memory(
    encoder: Encoder, documents: Sequence[str], *, max_length: int | None = None
) -> tuple[npt.NDArray[np.float32], int]:
    """Encode ``documents``: (their embeddings, the most bytes in use, see ``Efficiency``)."""
    import torch

    model = encoder.retriever.model
    held = encoder.weight_bytes  # other models may lie beside this one: only what is its own counts
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        embeddings = encoder.encode(documents, "document", max_length=max_length)
        return embeddings, held + int(torch.cuda.max_memory_allocated(model.device)) - before
    before = _resident("VmRSS", reset=True)
    embeddings = encoder.encode(documents, "document", max_length=max_length)
    return embeddings, held + max(0, _resident("VmHWM") - before)


def _resident(field: str, *, reset: bool = False) -> int:
    """Bytes of this process from /proc (VmRSS: now, VmHWM: most since the last reset); 0 without /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the current size
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    return int(found.group(1)) * 1024 if found else 0
