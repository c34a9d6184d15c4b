"""One training step whose negatives span the whole global batch, in bounded memory, exact on any engine.

The loss L is a function of the embeddings of the global batch, and the gradient of a parameter is

    dL/dp = sum over texts x of  dL/de_x . de_x/dp

so a step has three parts: embeddings of every text; L and dL/de from the embeddings gathered from all ranks
(each rank computes the whole, small, loss matrix); and a backward pass through every text's own graph with
dL/de_x as its cached output gradient (GradCache, Gao et al. 2021, arXiv 2101.06983). Texts whose graphs fit
the token budget are computed once; the others are computed without a graph first and again for their
backward pass. No gradient ever crosses ranks on its way to an embedding, which is why every ZeRO stage gives
the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effir_ray.encoding.batching import token_budget_batches
from effir_ray.training.step.batches import Batch
from effir_ray.training.step.engine import Passes, gather_rows, largest, rank, world_size
from effir_ray.training.step.losses import Objective, Targets

CHUNK_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Most tokens of one pass. Matrix products gain nothing from more; memory and padding only grow."""

WORTHWHILE_TOKENS = {"cpu": 256, "cuda": 8192}
"""A pass with so many tokens is efficient by itself: a much shorter text is better in the next one."""

Teacher = Callable[[Batch], tuple[Tensor, Tensor]]  # queries (b, t), documents (b * k, t)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """``loss`` and ``terms`` are those of the global batch; ``tokens`` and ``computed`` this rank's: real
    tokens of its texts, and tokens put through the model in the forward pass (padding and recomputation
    included). ``mean_cosine`` of the documents says when the embeddings collapse into one direction (1 is
    collapsed)."""

    loss: float
    terms: dict[str, float]
    tokens: int
    computed: int
    mean_cosine: float


class ContrastiveStep:
    """Computes the gradients of one batch into ``engine``; the caller then steps the optimizer."""

    def __init__(
        self,
        engine: Passes,
        objective: Objective,
        *,
        token_budget: int | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self._engine, self._objective = engine, objective
        self._teacher = teacher
        self.token_budget = token_budget

    def __call__(self, batch: Batch) -> StepOutcome:
        lengths = [len(tokens) for tokens in batch.tokens]
        chunks, kept = self._chunks(lengths)
        again = len(chunks) - kept
        noise: list[Tensor] = []
        pieces: list[Tensor] = []
        for index, rows in enumerate(chunks):
            if index < again:
                noise.append(_random_state(self._engine.device))
            with torch.set_grad_enabled(index >= again):
                pieces.append(self._encode(batch, rows))
        embeddings = torch.cat([piece.detach() for piece in pieces])
        order = torch.tensor([row for rows in chunks for row in rows], device=embeddings.device)
        loss, terms, gradient, mean_cosine = self._loss(batch, embeddings[order.argsort()])
        cached = list(torch.split(gradient[order], [len(rows) for rows in chunks]))
        self._backward_kept(pieces[again:], cached[again:], last=again == 0)
        del pieces
        for index in range(again):
            with _replayed(noise[index], self._engine.device):
                embedding = self._encode(batch, chunks[index])
            self._engine.backward((embedding * cached[index]).sum(), last=index == again - 1)
        computed = sum(self._cost(lengths, rows) * (2 if i < again else 1) for i, rows in enumerate(chunks))
        return StepOutcome(
            loss=loss, terms=terms, tokens=sum(lengths), computed=computed, mean_cosine=mean_cosine
        )

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """Embeddings (b + b * k, d) of the batch's texts, without gradients."""
        chunks, _ = self._chunks([len(tokens) for tokens in batch.tokens])
        embeddings = torch.cat([self._encode(batch, rows) for rows in chunks])
        order = torch.tensor([row for rows in chunks for row in rows], device=embeddings.device)
        return embeddings[order.argsort()]

    def _backward_kept(self, pieces: Sequence[Tensor], cached: Sequence[Tensor], *, last: bool) -> None:
        self._engine.backward((torch.cat(list(pieces)) * torch.cat(list(cached))).sum(), last=last)

    def _chunks(self, lengths: Sequence[int]) -> tuple[list[list[int]], int]:
        """Rows a forward pass, and how many of the last passes keep their graph: equal counts on every rank.

        ZeRO exchanges weights and gradients inside the passes, so no rank may make one more than another.
        """
        chunks = common_chunks(lengths, self._engine, self.token_budget)
        costs = [self._cost(lengths, rows) for rows in chunks]
        return chunks, -int(largest(-kept_passes(costs, self.token_budget), self._engine.device))

    def _cost(self, lengths: Sequence[int], rows: Sequence[int]) -> int:
        return pass_tokens([lengths[row] for row in rows], padded=self._engine.padded)

    def _encode(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        return encode_rows(self._engine, [batch.tokens[row] for row in rows])

    def _loss(self, batch: Batch, local: Tensor) -> tuple[float, dict[str, float], Tensor, float]:
        """Loss and terms of the global batch, and the gradient for this rank's own embeddings.

        ``local`` (b + b * k, d) float32. Engines average over ranks, hence the factor in the gradient.
        """
        b = batch.n_queries
        queries = gather_rows(local[:b]).requires_grad_()
        documents = gather_rows(local[b:]).requires_grad_()
        targets = self._targets(batch)
        with torch.enable_grad():
            loss, terms = self._objective(queries, documents, targets)
        d_queries, d_documents = torch.autograd.grad(loss, [queries, documents])
        own = [gradient.chunk(world_size())[rank()] for gradient in (d_queries, d_documents)]
        gradient = torch.cat(own) * world_size()
        return float(loss.detach()), terms, gradient, mean_cosine(documents.detach())

    def _targets(self, batch: Batch) -> Targets:
        """Masks and teachers of the global batch, gathered from the ranks."""
        device = self._engine.device
        b, k, _ = batch.document_ids.shape
        ids = gather_rows(batch.document_ids.to(device)).flatten(0, 1)  # (n, 2)
        first = rank() * b * k
        listed = first + torch.arange(b * k, device=device).view(b, k)
        allowed = torch.stack([~torch.isin(ids, known.to(device)).any(dim=1) for known in batch.positive_ids])
        allowed.scatter_(1, listed[:, :1], True)
        teacher = self._teacher(batch) if self._teacher is not None else (None, None)
        queries, documents = (None if part is None else gather_rows(part.to(device)) for part in teacher)
        return Targets(
            listed=gather_rows(listed),
            allowed=gather_rows(allowed.to(torch.uint8)).bool(),
            teacher_scores=gather_rows(batch.teacher_scores.to(device)),
            teacher_queries=queries,
            teacher_documents=documents,
        )


def encode_rows(engine: Passes, tokens: Sequence[list[int]]) -> Tensor:
    """Embeddings (len(tokens), d) of some texts in one pass."""
    ids = torch.tensor([token for text in tokens for token in text])
    return engine(ids.to(engine.device), torch.tensor([len(text) for text in tokens]))


def common_chunks(lengths: Sequence[int], engine: Passes, token_budget: int | None = None) -> list[list[int]]:
    """Rows of each forward pass, equally many passes on every rank (a collective).

    Passes as large as the budget recompute nearly everything when the batch is a little larger than that;
    smaller ones leave more of the budget to graphs that are kept. A pass itself costs as much as some tokens.
    """
    most, worthwhile = CHUNK_TOKENS[engine.device.type], WORTHWHILE_TOKENS[engine.device.type]
    limits = [most] if token_budget is None else [min(token_budget // part, most) for part in (1, 2, 4)]

    def cost(chunks: list[list[int]]) -> float:
        tokens = [pass_tokens([lengths[row] for row in rows], padded=engine.padded) for rows in chunks]
        again = tokens[: len(chunks) - kept_passes(tokens, token_budget)]
        return sum(tokens) + sum(again) + len(chunks) * worthwhile / 4

    plans = [
        token_budget_batches(lengths, max(1, limit), padded=engine.padded, worthwhile=worthwhile)
        for limit in limits
    ]
    chunks = min(plans, key=cost)
    return split_chunks(chunks, int(largest(len(chunks), engine.device)))


def pass_tokens(lengths: Sequence[int], *, padded: bool) -> int:
    """Tokens that a pass over texts of these lengths computes."""
    return max(lengths) * len(lengths) if padded else sum(lengths)


def kept_passes(tokens: Sequence[int], token_budget: int | None) -> int:
    """How many of the last passes fit the budget together: their graphs are kept, at least one's."""
    kept, used = 0, 0
    for count in reversed(tokens):
        used += count
        if token_budget is not None and used > token_budget:
            break
        kept += 1
    return max(1, kept)


def split_chunks(chunks: list[list[int]], count: int) -> list[list[int]]:
    """Halve the groups with most rows until there are ``count``."""
    chunks = list(chunks)
    while len(chunks) < count:
        index = max(range(len(chunks)), key=lambda i: len(chunks[i]))
        rows = chunks[index]
        chunks[index : index + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return chunks


def mean_cosine(embeddings: Tensor) -> float:
    """Mean cosine of all pairs of different rows: (|sum of unit vectors|^2 - n) / (n (n - 1))."""
    n = embeddings.shape[0]
    if n < 2:
        return 0.0
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    return float((unit.sum(dim=0).square().sum() - n) / (n * (n - 1)))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class _replayed:
    """Dropout draws what it drew in the pass whose gradient is being computed."""

    def __init__(self, state: Tensor, device: torch.device) -> None:
        self._state, self._device = state, device

    def __enter__(self) -> None:
        self._now = _random_state(self._device)
        self._set(self._state)

    def __exit__(self, *exception: object) -> None:
        self._set(self._now)

    def _set(self, state: Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)
