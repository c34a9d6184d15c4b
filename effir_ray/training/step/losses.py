"""What a batch of embeddings is trained towards. Every term is a function of embeddings alone.

That makes each exact under any split of the batch: whoever computed the embeddings, on whatever rank and in
whatever micro-batch, the loss and its gradient with respect to every embedding are those of one process.

Shapes: b queries and n documents of the global batch, k documents listed for a query (its positive, then its
hard negatives), d embedding size, t the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from effir_ray.contrastive import cosine, info_nce
from effir_ray.errors import InputError
from effir_ray.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is known of a batch beside its embeddings.

    listed (b, k): the columns of a query's own documents among the n; column 0 is its positive.
    allowed (b, n): False for the other documents known to be relevant (copies of the positive included).
    teacher_scores (b, k): a reranker's scores of the listed documents; NaN where there is none.
    teacher_queries (b, t), teacher_documents (n, t): embeddings of the uncompressed model.
    """

    listed: Tensor
    allowed: Tensor
    teacher_scores: Tensor | None = None
    teacher_queries: Tensor | None = None
    teacher_documents: Tensor | None = None


Term = Callable[[Tensor, Tensor, Targets], Tensor]  # queries (b, d), documents (n, d) -> scalar


@dataclass(frozen=True)
class InfoNCE:
    """``contrastive.info_nce`` over all documents of the batch; T = 0.02 in the paper, section 4."""

    temperature: float

    def __call__(self, queries: Tensor, documents: Tensor, targets: Targets) -> Tensor:
        return info_nce(
            queries,
            documents,
            positives=targets.listed[:, 0],
            allowed=targets.allowed,
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class ScoreDistillation:
    """1/m sum_i KL( softmax(r_i / R) || softmax(s_i / T) ) over the scored documents listed for query i.

    r are a reranker's scores, R their temperature; m counts the queries with at least two scored documents,
    however many the others have. The paper, section 4; Hinton et al. 2015 (1503.02531).
    """

    temperature: float
    teacher_temperature: float

    def __call__(self, queries: Tensor, documents: Tensor, targets: Targets) -> Tensor:
        scores = targets.teacher_scores
        if scores is None:
            return queries.sum() * 0.0
        known = ~scores.isnan()
        rows = known.sum(dim=1) >= 2
        similarity = cosine(queries, documents).gather(1, targets.listed)[rows]
        teacher = _masked_log_softmax(scores[rows] / self.teacher_temperature, known[rows])
        student = _masked_log_softmax(similarity / self.temperature, known[rows])
        divergence = functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return divergence / rows.sum().clamp(min=1)


@dataclass(frozen=True)
class EmbeddingDistillation:
    """1/b sum_x |e_x - u_x|^2 over all b + n texts, unit vectors: 2 - 2 cos(e_x, u_x); ``l2``: |e_x - u_x|.

    Every text's embedding goes where the teacher's u is: Reimers and Gurevych 2020 (arXiv 2004.09813), eq. 1;
    the plain norm is LEAF's (arXiv 2509.12539). A sum over a query's own texts, as InfoNCE is: a mean would
    weigh the less the more hard negatives there are.

    ``projection`` (d, t): of a student that was cut from the teacher and projects its embeddings, what it
    projects by before it learns. The teacher's are projected alike, by the same matrix at every step.
    """

    distance: Literal["cosine", "l2"] = "cosine"
    projection: Tensor | None = None

    def __call__(self, queries: Tensor, documents: Tensor, targets: Targets) -> Tensor:
        teacher_queries, teacher_documents = _teacher(targets)
        student = torch.cat([queries, documents])
        teacher = torch.cat([teacher_queries, teacher_documents])
        if self.projection is not None:
            teacher = _projected(teacher, self.projection.to(teacher))
        if student.shape[1] > teacher.shape[1]:
            raise InputError(
                f"embedding distillation: the teacher's embeddings have {teacher.shape[1]} dimensions, the "
                f"student's {student.shape[1]}; use a teacher with at least as many, or similarity instead"
            )
        # A shorter student is a Matryoshka prefix: it meets the same prefix of the teacher.
        apart = 2 - 2 * functional.cosine_similarity(student, teacher[:, : student.shape[1]])
        # The root's gradient is infinite at 0, where rounding may also leave a negative number.
        distances = apart if self.distance == "cosine" else apart.clamp(min=1e-9).sqrt()
        return distances.sum() / len(queries)


@dataclass(frozen=True)
class SimilarityDistillation:
    """1/b sum_i KL( softmax_j(cos(u_i, v_j) / T) || softmax_j(s_ij / T) ) over all n documents of the batch.

    The teacher's whole ranking of the batch is matched, so dimensions may differ. SEED, Fang et al. 2021
    (arXiv 2101.04731), eq. 5.
    """

    temperature: float

    def __call__(self, queries: Tensor, documents: Tensor, targets: Targets) -> Tensor:
        teacher = torch.log_softmax(cosine(*_teacher(targets)) / self.temperature, dim=1)
        student = torch.log_softmax(cosine(queries, documents) / self.temperature, dim=1)
        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Matryoshka:
    """1/|M| sum_{m in M} loss(e[:m]): nested dimensions, each with the same weight.

    Kusupati et al. 2022 (arXiv 2205.13147), eq. 1. The full dimension always is one of M.
    """

    term: Term
    dimensions: tuple[int, ...]

    def __call__(self, queries: Tensor, documents: Tensor, targets: Targets) -> Tensor:
        full = queries.shape[1]
        too_long = [size for size in self.dimensions if size > full]
        if too_long:
            raise InputError(f"matryoshka: {too_long[0]} dimensions asked of embeddings that have {full}")
        sizes = sorted({*self.dimensions, full})
        losses = [self.term(queries[:, :size], documents[:, :size], targets) for size in sizes]
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Objective:
    """The weighted sum of named terms."""

    terms: dict[str, tuple[float, Term]]

    def __call__(
        self, queries: Tensor, documents: Tensor, targets: Targets
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss (scalar, differentiable) and the unweighted value of each term."""
        values = {name: term(queries, documents, targets) for name, (_, term) in self.terms.items()}
        total = torch.stack([self.terms[name][0] * value for name, value in values.items()]).sum()
        return total, {name: float(value.detach()) for name, value in values.items()}


def _projected(teacher: Tensor, projection: Tensor) -> Tensor:
    """(n, t) -> (n, d), of a teacher whose embeddings are not as short already."""
    out, into = projection.shape
    if teacher.shape[1] not in (out, into):
        raise InputError(
            f"embedding distillation: the teacher's embeddings have {teacher.shape[1]} dimensions, the "
            f"student's {out}, projected from {into}; use the model it was cut from, or similarity instead"
        )
    return teacher if teacher.shape[1] == out else teacher @ projection.T


def build_objective(
    config: TrainConfig, *, has_teacher_scores: bool, projection: Tensor | None = None
) -> Objective:
    """The terms of ``config``; score distillation only where the training pairs carry a reranker's scores.
    ``projection``: the student's, see ``EmbeddingDistillation``.

    Raises InputError when that leaves nothing to learn from.
    """
    distillation = config.distillation
    terms: dict[str, tuple[float, Term]] = {}
    if config.info_nce:
        terms["info_nce"] = (config.info_nce, InfoNCE(config.temperature))
    if distillation.scores and has_teacher_scores:
        scored = ScoreDistillation(config.temperature, distillation.temperature)
        terms["scores"] = (distillation.scores, scored)
    if distillation.embedding:
        term = EmbeddingDistillation(distillation.distance, projection)
        terms["embedding"] = (distillation.embedding, term)
    if distillation.similarity:
        ranking = SimilarityDistillation(distillation.similarity_temperature)
        terms["similarity"] = (distillation.similarity, ranking)
    if not terms:
        raise InputError(
            f"{config.dataset}: info_nce is 0 and no pair has a reranker's scores: nothing to learn from; "
            "give distillation a teacher and an embedding weight"
        )
    if config.matryoshka:
        nested = config.matryoshka
        terms = {name: (weight, Matryoshka(term, nested)) for name, (weight, term) in terms.items()}
    return Objective(terms)


def _masked_log_softmax(logits: Tensor, known: Tensor) -> Tensor:
    """(m, k): over the known columns alone; the others are 0, so that a divergence of two has no 0 * inf."""
    return torch.log_softmax(logits.masked_fill(~known, float("-inf")), dim=1).masked_fill(~known, 0.0)


def _teacher(targets: Targets) -> tuple[Tensor, Tensor]:
    if targets.teacher_queries is None or targets.teacher_documents is None:
        raise InputError("distillation needs the teacher's embeddings of the batch; none were given")
    return targets.teacher_queries, targets.teacher_documents
