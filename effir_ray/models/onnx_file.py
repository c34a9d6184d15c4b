"""A checkpoint as an ONNX file, which onnxruntime runs without torch or transformers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever, load_retriever

ONNX = "onnx/model.onnx"
"""Where libraries and the hub look for it in a checkpoint."""

TOLERANCE = 1e-4
_LARGEST_MESSAGE = 1.8e9  # an ONNX file is one protobuf message, of at most 2 GiB; weights lie beside it then
_OPSET = 20
_PROBES = ((1, 1), (2, 7), (3, 40), (2, 300))  # texts, tokens


class _Embedder(nn.Module):
    def __init__(self, retriever: Retriever) -> None:
        super().__init__()
        self.model, self._retriever = retriever.model, retriever

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden, self._retriever.pool(hidden, attention_mask)


def write_onnx(folder: Path) -> Path:
    """Write ``folder/onnx/model.onnx`` of the checkpoint in ``folder``; returns it.

    Inputs are ``input_ids`` and ``attention_mask`` (texts, tokens), int64, of any size; padding may be on
    either side. Outputs are ``last_hidden_state`` (texts, tokens, hidden) and ``sentence_embedding`` (texts,
    dimension), pooled, projected and scaled as the checkpoint says, in float32.

    Raises InputError without the packages of the extra ``onnx``, and where onnxruntime's embeddings are
    further than 1e-4 from torch's.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise InputError(f"writing ONNX needs the package {package}: pip install 'effir-ray[onnx]'")

    retriever = load_retriever(folder)
    embedder = _Embedder(retriever).eval()
    file = folder / ONNX
    file.parent.mkdir(exist_ok=True)
    size = sum(parameter.nbytes for parameter in retriever.model.parameters())
    dynamic = {0: torch.export.Dim("texts", min=1), 1: torch.export.Dim("tokens", min=1)}
    with _quiet(), torch.inference_mode():
        torch.onnx.export(
            embedder,
            _probe(retriever, 2, 7),
            file,
            dynamo=True,
            opset_version=_OPSET,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state", "sentence_embedding"],
            dynamic_shapes={"input_ids": dynamic, "attention_mask": dynamic},
            external_data=size > _LARGEST_MESSAGE,
            verbose=False,
        )
    check_onnx(retriever, file)
    return file


def _probe(retriever: Retriever, texts: int, tokens: int, *, at_start: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and a mask: every text is a token shorter than the one before it, padded at the end."""
    random = torch.Generator().manual_seed(texts * tokens)
    ids = torch.randint(retriever.model.config.vocab_size, (texts, tokens), generator=random)
    lengths = torch.tensor([max(1, tokens - number) for number in range(texts)])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return ids, mask.flip(1) if at_start else mask


def check_onnx(retriever: Retriever, file: Path) -> None:
    """Raises InputError where onnxruntime makes other embeddings of ``file`` than ``retriever`` gives."""
    import onnxruntime

    embedder = _Embedder(retriever).eval()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    longest = retriever.model.config.max_position_embeddings
    for (texts, tokens), at_start in product(_PROBES, (False, True)):
        ids, mask = _probe(retriever, texts, min(tokens, longest), at_start=at_start)
        with torch.inference_mode():
            wanted = embedder(ids, mask)[1].numpy()
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        found = session.run(["sentence_embedding"], inputs)[0]
        off = float(np.abs(found - wanted).max())
        if not off <= TOLERANCE:
            raise InputError(
                f"{retriever.name}: onnxruntime's embeddings are {off:.1e} from torch's, more than "
                f"{TOLERANCE:g}: this model cannot be written as ONNX"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of optional packages and of its own insides."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
