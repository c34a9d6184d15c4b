"""What is watched while a model trains: dev scores, MFU, and a stop when training has failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from effir_ray.compression.planning import within
from effir_ray.data.datasets import Dataset
from effir_ray.encoding.gemm_peak import gemm_peak
from effir_ray.errors import TrialFailure
from effir_ray.evaluation.index import exact_search
from effir_ray.evaluation.metrics import score_run
from effir_ray.models.accounting import flops
from effir_ray.models.retriever import Retriever
from effir_ray.training.config import DevConfig
from effir_ray.training.step.batches import Tokenize
from effir_ray.training.step.engine import Engine, gather_rows, rank, world_size
from effir_ray.training.step.gradcache import common_chunks, encode_rows
from effir_ray.training.step.ladder import Rung


class DevScore:
    """Scores the weights as they are. Every rank calls it at the same steps and gets the same number."""

    def __init__(
        self,
        engine: Engine,
        tokenize: Tokenize,
        dataset: Dataset,
        dev: DevConfig,
        *,
        seed: int,
        token_budget: int | None = None,
    ) -> None:
        """``token_budget``: at most so many tokens a pass, as in training."""
        sample = dataset.sample("dev", queries=dev.queries, documents=dev.documents, seed=seed)
        queries = sample.queries("dev")
        self._engine, self._token_budget = engine, token_budget
        self._query_ids, self._document_ids = list(queries), sample.corpus.ids
        self._queries = tokenize(list(queries.values()), "query")
        self._documents = tokenize(
            [document.document_text for document in sample.corpus.iter_documents()], "document"
        )
        self._qrels = sample.qrels("dev")

    def __call__(self) -> float:
        self._engine.encoder.eval()
        queries, documents = (self._encode(texts).cpu().numpy() for texts in (self._queries, self._documents))
        self._engine.encoder.train()
        scores, found = exact_search(queries, documents, k=min(10, len(documents)), backend="torch")
        run = {
            query: {
                self._document_ids[index]: float(score)
                for score, index in zip(*row, strict=True)
                if index >= 0
            }
            for query, row in zip(self._query_ids, zip(scores, found, strict=True), strict=True)
        }
        return score_run(run, self._qrels).mean["ndcg@10"]

    @torch.no_grad()
    def _encode(self, tokens: Sequence[list[int]]) -> Tensor:
        """(len(tokens), d): each rank encodes every world-th text, in equally many passes."""
        world = world_size()
        padding = -len(tokens) % world
        mine = [*tokens, *[tokens[0]] * padding][rank() :: world]
        chunks = common_chunks([len(ids) for ids in mine], self._engine, self._token_budget)
        pieces = [encode_rows(self._engine, [mine[row] for row in rows]) for rows in chunks]
        order = torch.tensor([row for rows in chunks for row in rows], device=self._engine.device)
        gathered = gather_rows(torch.cat(pieces)[order.argsort()])
        # Row i of rank r is text i * world + r.
        whole = gathered.view(world, len(mine), -1).transpose(0, 1).reshape(world * len(mine), -1)
        return whole[: len(tokens)]


class Utilization:
    """Model FLOPs utilization (MFU) of a worker: 3 x forward FLOPs / seconds / the device's peak FLOP/s.

    A backward pass costs two forwards, one for the inputs of every product and one for its weights; where the
    weights are frozen (under adapters, which are small) only the first. Padding and recomputation (GradCache,
    checkpointing) are work that the model did not ask for and do not count. Chowdhery et al. 2022 (PaLM,
    arXiv 2204.02311), appendix B. The peak is that of large matrix products on this device, measured once.
    """

    def __init__(
        self, retriever: Retriever, device: torch.device, dtype: torch.dtype, *, frozen: bool = False
    ) -> None:
        config, plan = retriever.model.config, retriever.plan
        widths = [retriever.family.width(layer) for layer in retriever.family.layers(retriever.model)]

        def cost(tokens: int, rung: Rung | None) -> int:
            return flops(config, plan if rung is None else within(rung.plan(widths), plan), tokens)

        self._flops = cache(cost)
        self._forwards = 2 if frozen else 3
        self._peak = gemm_peak(device, "bfloat16" if dtype == torch.bfloat16 else "float32")

    def __call__(self, lengths: Sequence[int], seconds: float, rungs: Sequence[Rung] = ()) -> float:
        """MFU of a step that trained on texts of ``lengths`` tokens in ``seconds``, the model and ``rungs``
        of it.
        """
        forward = sum(self._flops(tokens, network) for network in (None, *rungs) for tokens in lengths)
        return self._forwards * forward / seconds / self._peak


class CollapseDetector:
    """Raises TrialFailure for a run that cannot be trusted: figures that are not finite, or collapse.

    Collapsed means that all documents have one embedding (mean cosine above ``cosine``) and InfoNCE says the
    model guesses (within ``tolerance`` of ln ``candidates``, the documents a query chooses from),
    ``patience`` steps in a row. The first ``grace`` steps are not judged: an untrained backbone starts near
    there.
    """

    def __init__(
        self,
        *,
        candidates: int,
        grace: int,
        patience: int = 10,
        cosine: float = 0.99,
        tolerance: float = 0.02,
    ) -> None:
        self._chance = math.log(max(candidates, 2))
        self._grace, self._patience = grace, patience
        self._cosine, self._tolerance = cosine, tolerance
        self._in_a_row = 0

    def on_row(self, row: Mapping[str, Any]) -> None:
        """``row`` has ``step``, ``loss``, ``grad_norm`` and ``mean_cosine``; without ``loss_info_nce`` only
        figures that are not finite end the run: a teacher's embeddings hold the student's apart."""
        broken = [
            f"{name} {row[name]}"
            for name in ("loss", "grad_norm", "mean_cosine")
            if not math.isfinite(row[name])
        ]
        if broken:
            raise TrialFailure(
                f"step {row['step']}: {', '.join(broken)}; try a lower learning_rate or precision float32"
            )
        if "loss_info_nce" not in row:
            return
        info_nce, cosine = row["loss_info_nce"], row["mean_cosine"]
        guessing = abs(info_nce - self._chance) <= self._tolerance * self._chance
        collapsed = row["step"] > self._grace and guessing and cosine > self._cosine
        self._in_a_row = self._in_a_row + 1 if collapsed else 0
        if self._in_a_row >= self._patience:
            raise TrialFailure(
                f"step {row['step']}: the embeddings have collapsed: for {self._patience} steps the mean "
                f"cosine of the documents was above {self._cosine} (now {cosine:.4f}) and InfoNCE at chance "
                f"({info_nce:.3f}; chance is {self._chance:.3f}); lower learning_rate or lengthen warmup"
            )
