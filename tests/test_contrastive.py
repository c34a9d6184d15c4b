"""InfoNCE against its equation, written out."""

import math

import pytest
import torch

from effir_ray.contrastive import info_nce


def test_the_loss_is_the_equation_with_and_without_masked_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(rows, 8, generator=generator) for rows in (3, 5))
    positives = torch.tensor([4, 0, 2])
    allowed = torch.ones(3, 5, dtype=torch.bool)
    allowed[0, 1] = allowed[2, 0] = False
    expected = 0.0
    for i, positive in enumerate(positives.tolist()):
        similar = [math.exp(float(torch.cosine_similarity(queries[i], d, dim=0)) / 0.3) for d in documents]
        negatives = sum(value for j, value in enumerate(similar) if allowed[i, j])
        expected -= math.log(similar[positive] / negatives) / 3
    documents.requires_grad_()
    loss = info_nce(queries, documents, positives=positives, allowed=allowed, temperature=0.3)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(
        info_nce(queries[:1], documents, positives=positives[:1], allowed=allowed[:1], temperature=0.3),
        documents,
    )
    assert gradient[1].abs().max() == 0  # what is masked for the only query is not pushed away
    assert gradient[0].abs().max() > 0
