"""How fast, how large and how spread out: efficiency figures of encoders, measured side by side.

All models are measured in turn within every round, so that whatever else the machine does hits them alike;
reported are medians over rounds, and speed-ups are ratios taken inside a round, with the interval in which
their median lies.
"""

from __future__ import annotations

import ctypes
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from effir_ray.config import Config
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.encoding.encoder import Encoder, as_encoder, comparable
from effir_ray.encoding.gemm_peak import gemm_peak, seconds_of
from effir_ray.errors import InputError
from effir_ray.evaluation.index import exact_search
from effir_ray.hardware import Computed, Precision
from effir_ray.models.accounting import flops
from effir_ray.progress import progress

_SEARCH_DEPTH = 100
MARGIN = 0.03  # of a speed-up, to both sides: enough to tell models a block apart
FEWEST_ROUNDS = 6  # whose range holds the median with 95 % confidence


class Efficiency(Config):
    """One model's figures. ``*_speedup``: relative to the reference, ``*_interval``: its median_interval.

    query_ms_*: latency of one query alone, tokenisation included. search_ms: exact search of one query over
    the measured documents, k = 100. document_ms, documents_per_s, tokens_per_s: throughput on all documents
    together. mfu: model FLOPs a second over the highest ``gemm_peak`` of the run. peak_memory_bytes: the
    weights of model and encoder and what encoding adds to them, on the GPU or in the process. isotropy: mean
    cosine between different documents (0 is best spread, near 1 is collapsed), None for a single one.
    other_load: share of the machine's cores that was busy with other work meanwhile. rounds: how many.
    precision: what products were multiplied in.
    """

    query_ms_p50: float
    query_ms_p95: float
    search_ms: float
    documents_per_s: float
    tokens_per_s: float
    document_ms: float
    query_speedup: float
    query_speedup_interval: tuple[float, float]
    document_speedup: float
    document_speedup_interval: tuple[float, float]
    mfu: float
    peak_memory_bytes: int
    isotropy: float | None
    other_load: float
    rounds: int
    precision: Computed


def measure(
    models: Sequence[str | Path],
    dataset: str | Path | Dataset,
    *,
    queries: int = 20,
    documents: int = 64,
    rounds: int = 5,
    precision: Precision | None = None,
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
        {name: as_encoder(name, precision=precision) for name in names},
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
    margin: float = 0.0,
    reference: str,
    query_max_length: int | None = None,
    document_max_length: int | None = None,
) -> dict[str, Efficiency]:
    """Figures of every model, by name; ``reference`` names the one that speed-ups are relative to.

    There are ``rounds`` rounds, or fewer (six at least) once every speed-up's interval is no wider than
    ``margin`` to both sides, as a share of it.
    Encoders whose precision nobody asked for all compute in one, see ``comparable``.
    Texts are cut to ``*_max_length`` tokens, by default to what each model's own settings say.
    Raises InputError for a reference that is not among the models and for empty inputs.
    """
    if reference not in models:
        raise InputError(f"reference '{reference}' is not measured; measured: {', '.join(models)}")
    if not queries or not documents or rounds < 1:
        raise InputError("measuring needs at least one query, one document and one round")
    cut = {"query": query_max_length, "document": document_max_length}
    runs = {name: _Meter(own, queries, documents, cut) for name, own in comparable(models).items()}
    names = list(runs)
    load = _OtherLoad()
    with progress("Measuring", total=rounds * len(names), unit="passes") as bar:
        for number in range(rounds):
            shift = number % len(names)  # nobody always runs after the same neighbour
            for name in names[shift:] + names[:shift]:
                runs[name].round()
                bar.advance()
            if number + 1 >= FEWEST_ROUNDS and all(
                run.uncertainty(runs[reference]) <= margin for run in runs.values()
            ):
                break
    other = load.share()
    # A peak is what a machine can do at best: other work can only have lowered what was measured of it.
    peaks: dict[object, float] = {}
    for run in runs.values():
        peaks[run.place] = max(run.peak, peaks.get(run.place, 0.0))
    return {name: run.figures(runs[reference], peaks[run.place], other) for name, run in runs.items()}


def median_interval(values: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, float]:
    """Two of the values between which the median lies with 95 % confidence, whatever they are distributed as
    (order statistics: Conover, Practical Nonparametric Statistics, 3.2). Of fewer than six: their range."""
    ordered, n = np.sort(values), len(values)
    left_out = 0  # on either side: the median lies among them with a probability of at most 2.5 %
    while sum(math.comb(n, below) for below in range(left_out + 2)) <= 0.025 * 2**n:
        left_out += 1
    return float(ordered[left_out]), float(ordered[-1 - left_out])


_NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")  # what guests take is in user and nice already


class _OtherLoad:
    """How busy the machine is with anything but this process, from when it is made on."""

    def __init__(self) -> None:
        self._started = self._now()

    def share(self) -> float:
        seconds, busy, own = (now - then for now, then in zip(self._now(), self._started, strict=True))
        return max(0.0, busy - own) / (max(seconds, 1e-9) * (psutil.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        everything, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
        busy = sum(seconds for state, seconds in everything.items() if state not in _NOT_BUSY)
        return time.monotonic(), busy, own.user + own.system


class _Meter:
    """One model's measurements, a row a round."""

    def __init__(
        self,
        encoder: Encoder,
        queries: Sequence[str],
        documents: Sequence[str],
        cut: Mapping[str, int | None],
    ) -> None:
        self._encoder, self._queries, self._documents = encoder, queries, documents
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
        self.place = retriever.model.device, encoder.precision
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

    def _ratios(self, reference: _Meter) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(rounds,) speed-ups on queries, and on documents."""
        queries = np.sum(reference._query_seconds, axis=1) / np.sum(self._query_seconds, axis=1)
        return queries, np.array(reference._document_seconds) / np.array(self._document_seconds)

    def uncertainty(self, reference: _Meter) -> float:
        """Half the width of the wider interval, as a share of the speed-up."""
        widths = []
        for ratios in self._ratios(reference):
            low, high = median_interval(ratios)
            widths.append((high - low) / 2 / float(np.median(ratios)))
        return max(widths)

    def figures(self, reference: _Meter, peak: float, other_load: float) -> Efficiency:
        latencies = np.median(self._query_seconds, axis=0)  # (queries,): the median over rounds of each
        seconds = float(np.median(self._document_seconds))
        query_ratios, document_ratios = self._ratios(reference)
        return Efficiency(
            query_ms_p50=1000 * float(np.quantile(latencies, 0.5)),
            query_ms_p95=1000 * float(np.quantile(latencies, 0.95)),
            search_ms=1000 * float(np.median(self._search_seconds)),
            documents_per_s=len(self._documents) / seconds,
            tokens_per_s=self._tokens / seconds,
            document_ms=1000 * seconds / len(self._documents),
            query_speedup=float(np.median(query_ratios)),
            query_speedup_interval=median_interval(query_ratios),
            document_speedup=float(np.median(document_ratios)),
            document_speedup_interval=median_interval(document_ratios),
            mfu=self._flops / seconds / peak,
            peak_memory_bytes=self._memory,
            isotropy=isotropy([self._embeddings]) if len(self._embeddings) > 1 else None,
            other_load=other_load,
            rounds=len(document_ratios),
            precision=self._encoder.precision,
        )


def isotropy(blocks: Iterable[npt.NDArray[np.float32]]) -> float:
    """Mean cosine over all pairs of different rows of all (n, d) blocks, in one pass:
    (|sum u|^2 - n) / (n (n - 1)). Raises InputError for fewer than two rows."""
    n, total = 0, np.zeros(())
    for block in blocks:
        units = block.astype(np.float64)
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        n, total = n + len(units), total + units.sum(axis=0)
    if n < 2:
        raise InputError(f"isotropy needs at least 2 embeddings, found {n}")
    return float((np.square(total).sum() - n) / (n * (n - 1)))


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
    _give_back()  # what earlier work freed would be used again, and not count
    before = _resident("VmRSS", reset=True)
    embeddings = encoder.encode(documents, "document", max_length=max_length)
    return embeddings, held + max(0, _resident("VmHWM") - before)


def _give_back() -> None:
    """Freed memory to the system, where the C library can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str, *, reset: bool = False) -> int:
    """Bytes of this process from /proc (VmRSS: now, VmHWM: most since the last reset); 0 without /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the current size
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    return int(found.group(1)) * 1024 if found else 0
