"""The contrastive loss of retrieval, once for training, gates and importance."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.02
"""Of the paper's InfoNCE (section 4)."""


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(b, d), (n, d) -> (b, n)"""
    return functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T


def info_nce(
    queries: Tensor, documents: Tensor, *, positives: Tensor, allowed: Tensor, temperature: float
) -> Tensor:
    """-1/b sum_i log( exp(s_ip / T) / sum_{j allowed} exp(s_ij / T) ), s the cosine, p the positive of i.

    van den Oord et al. 2018 (arXiv 1807.03748), eq. 4, with in-batch and hard negatives. queries (b, d),
    documents (n, d); positives (b,) int64: the place of each query's positive among the documents; allowed
    (b, n) bool: False for documents that are no negatives of a query though they are not its positive.
    """
    logits = cosine(queries, documents) / temperature
    return functional.cross_entropy(logits.masked_fill(~allowed, float("-inf")), positives)
