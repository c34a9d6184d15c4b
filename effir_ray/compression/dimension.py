"""Shorter embeddings: of all directions those stay in which texts differ most, so an index is smaller.

The embeddings of texts are projected to the eigenvectors of their second-moment matrix with the largest
eigenvalues. Of all projections to as many dimensions this keeps the dot products of these texts best, in
squares (Eckart and Young 1936): nothing is centred, because searching does not centre either. The axes are
ordered, so those of a shorter embedding are the first ones of a longer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from effir_ray.data.pairs import Pair
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.models.folder import TextKind
from effir_ray.models.projection import attach, projection_of

if TYPE_CHECKING:
    from effir_ray.models.retriever import Retriever

MOST_TEXTS = 2048
"""Texts that are looked at, with as many queries about them: several for each direction of a usual model."""


def embedding_axes(retriever: Retriever, examples: Sequence[Pair], *, max_length: int) -> NDArray[np.float32]:
    """(d, d): directions of the retriever's embeddings of length d, unit vectors in rows, those along which
    the texts of ``examples`` and the queries about them are largest first. Raises InputError without texts.
    """
    if not examples:
        raise InputError("a projection of embeddings needs texts to be fitted on; the calibration has none")
    encoder = Encoder(retriever)
    texts: dict[TextKind, list[str]] = {
        "document": [example.positives[0] for example in examples],
        "query": [example.query for example in examples],
    }
    return axes_of(
        *(
            encoder.encode(some, kind, max_length=max_length, progress="Encoding calibration texts")
            for kind, some in texts.items()
        )
    )


def axes_of(*vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(d, d): the same of embeddings, (n, d) each, that are there already."""
    moments = sum(each.T.astype(np.float64) @ each.astype(np.float64) for each in vectors)
    axes = np.linalg.eigh(moments)[1].T[::-1]
    largest = axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)]
    signed: NDArray[np.float32] = (axes * np.sign(largest)[:, None]).astype(np.float32)
    return signed  # or else a direction might point either way


@torch.no_grad()
def shorten(retriever: Retriever, axes: NDArray[np.float32], dimension: int) -> Retriever:
    """Let ``retriever`` give embeddings of length ``dimension``, along the first of ``axes``, in place.

    ``axes``: (d, d), see ``embedding_axes``, of embeddings as long as the retriever's own: what is projected
    already is projected further, by one matrix for both.
    """
    weight = torch.from_numpy(np.ascontiguousarray(axes[:dimension]))
    present = projection_of(retriever.model)
    if present is not None:
        weight = weight @ present.weight.float().cpu()
    attach(retriever.model, weight)
    retriever.plan = retriever.plan.model_copy(update={"dimension": dimension})
    return retriever
