"""Dev nDCG@10 during training, encoded by all ranks through the engine that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effir_ray.evaluation.index import exact_search
from effir_ray.evaluation.metrics import score_run
from effir_ray.training.config import DevConfig
from effir_ray.training.step.batches import Tokenize
from effir_ray.training.step.distributed import gather_rows, rank, world_size
from effir_ray.training.step.engine import Engine
from effir_ray.training.step.gradcache import common_chunks, encode_rows

if TYPE_CHECKING:
    from effir_ray.data.datasets import Dataset


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
