"""Texts, pairs and a slow, obviously right way to embed them."""

import torch

from effir_ray.data.pairs import Pair
from effir_ray.models.retriever import Retriever

TEXTS = [
    "a protein in the cell",
    "the function of this class is to return the list of values in the file, which is a string or a number",
    "data",
    "some results of the study have been used in other models since that time",
]
QUERIES = ["which cells have been used", "what is a list"]


PAIRS = [Pair(f"q{i}", f"what is {text[:12]}", (text,)) for i, text in enumerate(TEXTS)]


def vectors(retriever: Retriever, texts: list[str], kind: str = "document") -> torch.Tensor:
    """One text at a time, no padding: (texts, hidden)."""
    rows = []
    for tokens in retriever.tokenize(texts, kind):  # type: ignore[arg-type]  # parametrised literal
        ids = torch.tensor([tokens])
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            rows.append(
                retriever.pool(retriever.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
            )
    return torch.cat(rows)
