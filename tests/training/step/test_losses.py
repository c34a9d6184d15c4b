"""Each loss term against its equation, and what the embeddings' gradients must look like."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from effir_ray.compression.planning import make_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.contrastive import cosine
from effir_ray.data.pairs import load_pairs, shuffled
from effir_ray.encoding.padded import embed, pad
from effir_ray.errors import InputError
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import DistillationConfig, TrainConfig
from effir_ray.training.step.losses import (
    EmbeddingDistillation,
    InfoNCE,
    Matryoshka,
    ScoreDistillation,
    SimilarityDistillation,
    Targets,
    build_objective,
)
from tests.helpers.real_data import real_data


def example(b: int = 3, k: int = 2, d: int = 8) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(rows, d, generator=generator) for rows in (b, b * k))
    listed = torch.arange(b * k).view(b, k)
    return queries, documents, Targets(listed=listed, allowed=torch.ones(b, b * k, dtype=torch.bool))


def test_info_nce_is_the_mean_negative_log_likelihood_of_the_positive() -> None:
    queries, documents, targets = example()
    expected = 0.0
    for i in range(3):
        similar = [math.exp(float(torch.cosine_similarity(queries[i], d, dim=0)) / 0.5) for d in documents]
        expected -= math.log(similar[2 * i] / sum(similar)) / 3
    assert float(InfoNCE(0.5)(queries, documents, targets)) == pytest.approx(expected, rel=1e-5)


def test_a_masked_document_is_no_negative() -> None:
    queries, documents, targets = example()
    targets.allowed[0, 4] = False
    documents.requires_grad_()
    InfoNCE(0.5)(
        queries[:1], documents, Targets(listed=targets.listed[:1], allowed=targets.allowed[:1])
    ).backward()
    assert documents.grad is not None
    assert documents.grad[4].abs().max() == 0
    assert documents.grad[3].abs().max() > 0


def test_score_distillation_skips_queries_without_scores_and_vanishes_where_student_and_teacher_agree() -> (
    None
):
    queries, documents, targets = example()
    student = cosine(queries, documents).gather(1, targets.listed) / 0.1
    scores = student.clone()
    scores[1] = float("nan")
    term = ScoreDistillation(temperature=0.1, teacher_temperature=1.0)
    scored = Targets(listed=targets.listed, allowed=targets.allowed, teacher_scores=scores)
    assert float(term(queries, documents, scored)) == pytest.approx(0.0, abs=1e-6)
    scores[0] = student[0].flip(0)
    p, q = torch.softmax(student[0].flip(0), 0), torch.log_softmax(student[0], 0)
    expected = float((p * (p.log() - q)).sum()) / 2  # the mean of two scored queries, one of them at 0
    assert float(term(queries, documents, scored)) == pytest.approx(expected, rel=1e-4)
    missing = Targets(
        listed=targets.listed, allowed=targets.allowed, teacher_scores=torch.full_like(scores, torch.nan)
    )
    assert float(term(queries, documents, missing)) == 0.0


def test_score_distillation_uses_the_scored_documents_of_ragged_lists() -> None:
    """Queries with 2, 1 and 3 scored documents: two of them teach, each over its own documents alone."""
    queries, documents, targets = example(k=3)
    scores = torch.tensor([[3.0, math.nan, 1.0], [2.0, math.nan, math.nan], [0.5, 2.0, 1.0]])
    queries.requires_grad_()
    documents.requires_grad_()
    term = ScoreDistillation(temperature=0.5, teacher_temperature=2.0)
    loss = term(queries, documents, replace(targets, teacher_scores=scores))
    expected = 0.0
    for i, known in ((0, [0, 2]), (2, [0, 1, 2])):
        student = torch.softmax(cosine(queries, documents)[i, [3 * i + j for j in known]] / 0.5, 0)
        teacher = torch.softmax(scores[i, known] / 2.0, 0)
        expected += float((teacher * (teacher.log() - student.log())).sum().detach()) / 2
    assert expected > 0.01
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    by_query, by_document = torch.autograd.grad(loss, [queries, documents])
    taught = [row for row, gradient in enumerate(by_document) if gradient.abs().max() > 0]
    assert taught == [0, 2, 6, 7, 8]
    assert by_query.isfinite().all() and by_document.isfinite().all()


def test_teacher_embeddings_pull_towards_themselves() -> None:
    queries, documents, targets = example()
    same = Targets(
        listed=targets.listed,
        allowed=targets.allowed,
        teacher_queries=3 * queries,
        teacher_documents=0.5 * documents,
    )
    assert float(EmbeddingDistillation()(queries, documents, same)) == pytest.approx(0.0, abs=1e-6)
    assert float(SimilarityDistillation(0.1)(queries, documents, same)) == pytest.approx(0.0, abs=1e-6)
    assert float(SimilarityDistillation(0.1)(queries.flip(0), documents, same)) > 0.1
    with pytest.raises(InputError, match="teacher's embeddings"):
        EmbeddingDistillation()(queries, documents, targets)
    with pytest.raises(InputError, match="8 dimensions"):
        EmbeddingDistillation()(torch.ones(3, 9), torch.ones(6, 9), same)


def test_a_shorter_student_meets_the_teacher_by_its_own_projection() -> None:
    """And the first dimensions of it by the first of that."""
    queries, documents, targets = example()
    projection = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0][:4]
    taught = replace(targets, teacher_queries=queries, teacher_documents=documents)
    short = [2 * each @ projection.T for each in (queries, documents)]
    term = EmbeddingDistillation(projection=projection)
    assert float(term(*short, taught)) == pytest.approx(0.0, abs=1e-5)
    assert float(EmbeddingDistillation()(*short, taught)) > 0.1
    assert float(Matryoshka(term, (2,))(*short, taught)) == pytest.approx(0.0, abs=1e-5)
    itself = replace(targets, teacher_queries=short[0], teacher_documents=short[1])
    assert float(term(*short, itself)) == pytest.approx(0.0, abs=1e-5)
    other = replace(targets, teacher_queries=queries[:, :6], teacher_documents=documents[:, :6])
    with pytest.raises(InputError, match="have 6 dimensions, the student's 4, projected from 8"):
        term(*short, other)


def test_embedding_distance_is_the_squared_or_the_plain_one_of_unit_vectors() -> None:
    queries, documents, targets = example()
    taught = replace(targets, teacher_queries=queries.flip(1), teacher_documents=documents.flip(1))
    student = torch.nn.functional.normalize(torch.cat([queries, documents]), dim=1)
    teacher = torch.nn.functional.normalize(torch.cat([queries.flip(1), documents.flip(1)]), dim=1)
    apart = (student - teacher).norm(dim=1)
    squared, plain = (
        float(EmbeddingDistillation(distance)(queries, documents, taught)) for distance in ("cosine", "l2")
    )
    assert squared == pytest.approx(float((apart**2).sum()) / 3, rel=1e-5)
    assert plain == pytest.approx(float(apart.sum()) / 3, rel=1e-5)
    reached = replace(targets, teacher_queries=queries, teacher_documents=documents)
    queries.requires_grad_()
    EmbeddingDistillation("l2")(queries, documents, reached).backward()
    assert queries.grad is not None and bool(queries.grad.isfinite().all())


@pytest.mark.integration
def test_a_weight_of_1_moves_a_pruned_model_as_hard_as_info_nce_does() -> None:
    """MiniLM without blocks 1, 2 and 3 on SciFact: InfoNCE's gradient was 7 times the embedding term's, and
    more than that with hard negatives."""
    full = load_retriever("minilm-l6")
    student = apply_plan(load_retriever("minilm-l6"), make_plan(Schedule(drop_block=(1, 2, 3)), 6, None))
    student.model.eval()
    pairs = shuffled(load_pairs(real_data("scifact")), seed=0)[:32]  # in a row, many share their document
    queries = full.tokenize([pair.query for pair in pairs], "query", 64)
    documents = full.tokenize([pair.positives[0] for pair in pairs], "document", 128)
    with torch.no_grad():
        taught = [embed(full, pad(texts)) for texts in (queries, documents)]
    found = [embed(student, pad(texts)) for texts in (queries, documents)]
    targets = Targets(
        listed=torch.arange(32)[:, None],
        allowed=torch.ones(32, 32, dtype=torch.bool),
        teacher_queries=taught[0],
        teacher_documents=taught[1],
    )
    parameters = [p for name, p in student.model.named_parameters() if "pooler" not in name]
    norms = []
    for term in (
        InfoNCE(0.02),
        EmbeddingDistillation(),
        EmbeddingDistillation("l2"),
        SimilarityDistillation(DistillationConfig().similarity_temperature),
    ):
        gradients = torch.autograd.grad(
            term(*found, targets), parameters, retain_graph=True, allow_unused=True
        )
        known = [gradient for gradient in gradients if gradient is not None]
        norms.append(float(torch.nn.utils.get_total_norm(known)))
    assert all(1 / 4 < norm / norms[0] < 4 for norm in norms), norms


def test_similarity_has_a_temperature_of_its_own() -> None:
    """At InfoNCE's a teacher says no more than which document is the first."""
    distillation = DistillationConfig(teacher="m", similarity=1.0, similarity_temperature=0.3)
    config = TrainConfig(dataset="d", distillation=distillation)
    assert build_objective(config, has_teacher_scores=False).terms["similarity"] == (
        1.0,
        SimilarityDistillation(0.3),
    )


def test_nothing_to_learn_from_is_said() -> None:
    config = TrainConfig(dataset="pairs.jsonl", info_nce=0)
    assert list(build_objective(config, has_teacher_scores=True).terms) == ["scores"]
    with pytest.raises(InputError, match=r"pairs.jsonl: info_nce is 0 and no pair has"):
        build_objective(config, has_teacher_scores=False)


def test_matryoshka_averages_the_prefixes_and_the_whole() -> None:
    queries, documents, targets = example()
    term = InfoNCE(0.1)
    expected = sum(float(term(queries[:, :m], documents[:, :m], targets)) for m in (2, 4, 8)) / 3
    assert float(Matryoshka(term, (4, 2))(queries, documents, targets)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="9 dimensions"):
        Matryoshka(term, (9,))(queries, documents, targets)


def test_an_objective_has_the_terms_that_settings_and_data_call_for() -> None:
    config = TrainConfig(dataset="stdlib")
    assert list(build_objective(config, has_teacher_scores=True).terms) == ["info_nce", "scores"]
    assert list(build_objective(config, has_teacher_scores=False).terms) == ["info_nce"]
    distillation = DistillationConfig(teacher="m", embedding=0.5, similarity=2.0, scores=0.0)
    config = TrainConfig(dataset="stdlib", distillation=distillation)
    objective = build_objective(config, has_teacher_scores=True)
    queries, documents, targets = example()
    taught = Targets(
        listed=targets.listed,
        allowed=targets.allowed,
        teacher_queries=queries.flip(1),
        teacher_documents=documents.flip(1),
    )
    loss, terms = objective(queries, documents, taught)
    assert float(loss) == pytest.approx(
        terms["info_nce"] + 0.5 * terms["embedding"] + 2 * terms["similarity"], rel=1e-5
    )
