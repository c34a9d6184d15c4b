"""Texts to embeddings: token-budget batches, tokenisation one window ahead, rows in input order."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from effir_ray.encoding.batching import token_budget_batches
from effir_ray.encoding.packed import PackedForward, packed_forward
from effir_ray.encoding.padded import PaddedForward
from effir_ray.errors import InputError, TrialFailure
from effir_ray.hardware import detect
from effir_ray.models.accounting import flops
from effir_ray.models.folder import TextKind
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.progress import Progress
from effir_ray.progress import progress as show

WINDOW = 512  # texts that are tokenised ahead and ordered by length together
_CHECKED, _INT8_CLOSE = 8, 0.98
_BUDGET = {"cpu": 1024, "cuda": 32_768}
"""Tokens a batch. CPU: the activations of more no longer fit the caches; GPU: enough to fill it."""


class Encoder:
    """Embeds texts with one model; holds its own, faster copy of the weights.

    ``token_budget`` (tokens a batch) halves by itself when memory runs out and stays there. ``int8_cosine``:
    how close int8 comes to the model's own embeddings, the mean over the first texts encoded; below 0.98 a
    RuntimeWarning says so. None before, and for floats.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        token_budget: int | None = None,
        quantize: Literal["int8"] | None = None,
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise InputError(f"token_budget is {token_budget}; expected at least 1 token")
        self.retriever = retriever
        self.token_budget = token_budget or _BUDGET[retriever.model.device.type]
        self.quantize = quantize
        self.int8_cosine: float | None = None
        self.tokens_seen = 0  # over all calls
        self._lengths_seen: Counter[int] = Counter()  # texts by their number of tokens
        self._forward: PackedForward | PaddedForward
        self._snapshot: tuple[object, ...] = ()
        self._refresh()

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.retriever.model.config.hidden_size)

    @property
    def int8_warning(self) -> str:
        """What there is to say when int8 is far from the model's own embeddings; else ''."""
        if self.int8_cosine is None or self.int8_cosine >= _INT8_CLOSE:
            return ""
        return (
            f"int8 changes the embeddings of '{self.retriever.name}': mean cosine to its own "
            f"{self.int8_cosine:.3f} (at least {_INT8_CLOSE} is usual); check its scores or leave int8 out"
        )

    @property
    def weight_bytes(self) -> int:
        """What the weights take: the model's own, and the encoder's copy in the form it computes with."""
        self._refresh()
        own: int = sum(p.nbytes for p in self.retriever.model.parameters())
        return own + self._forward.copied_bytes

    @property
    def flops_seen(self) -> int:
        """FLOPs of the model over all calls, as ``models.accounting`` counts them."""
        config, plan = self.retriever.model.config, self.retriever.plan
        return sum(texts * flops(config, plan, length) for length, texts in self._lengths_seen.items())

    def encode(
        self,
        texts: Sequence[str],
        kind: TextKind,
        *,
        max_length: int | None = None,
        progress: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embeddings (n, d), row i for text i. ``progress`` is what a progress display calls the work.

        Without dropout, also in the middle of a training. Raises TrialFailure when one text alone does not
        fit memory.
        """
        self._refresh()
        embeddings = np.empty((len(texts), self.dimension), dtype=np.float32)
        display: AbstractContextManager[Progress] = (
            show(progress, total=len(texts), unit="docs" if kind == "document" else "queries")
            if progress
            else nullcontext(Progress("", None, ""))
        )
        with display as bar, torch.inference_mode(), _evaluating(self.retriever.model):
            for start, tokens in self._tokenised(texts, kind, max_length):
                if self.quantize and self.int8_cosine is None:
                    self._check_int8(tokens[:_CHECKED])
                self._encode_window(tokens, embeddings[start : start + len(tokens)], bar)
        return embeddings

    def _refresh(self) -> None:
        """Choose the forward pass, anew when the model was changed: trained on, pruned, masked by hooks."""
        snapshot = _state(self.retriever.model)
        if snapshot == self._snapshot:
            return
        self._snapshot, self.int8_cosine = snapshot, None
        fast = None if _is_hooked(self.retriever.model) else packed_forward(self.retriever, self.quantize)
        if self.quantize and (fast is None or self.retriever.model.device.type != "cpu"):
            raise InputError(
                f"int8 is for unmodified Llama-like and BERT models on CPUs; '{self.retriever.name}' is a "
                f"{self.retriever.model.config.model_type} on {self.retriever.model.device.type}"
            )
        self._forward = fast or PaddedForward(self.retriever)

    def _check_int8(self, tokens: list[list[int]]) -> None:
        """Some models lose much: huge activations of a few channels leave little of the rest in 8 bits."""
        exact = PaddedForward(self.retriever)
        pairs = [(self._forward([ids]), exact([ids])) for ids in tokens]
        cosines = [torch.nn.functional.cosine_similarity(a, b).item() for a, b in pairs]
        self.int8_cosine = sum(cosines) / len(cosines)
        if self.int8_warning:
            warnings.warn(self.int8_warning, RuntimeWarning, stacklevel=3)

    def _tokenised(
        self, texts: Sequence[str], kind: TextKind, max_length: int | None
    ) -> Iterator[tuple[int, list[list[int]]]]:
        """(first index, token lists) of each window; the next one is tokenised while this one is encoded."""
        starts = range(0, len(texts), WINDOW)
        if len(starts) <= 1:
            yield from ((0, self.retriever.tokenize(texts, kind, max_length)) for _ in starts)
            return
        with ThreadPoolExecutor(max_workers=1) as ahead:

            def tokenise(start: int) -> list[list[int]]:
                return self.retriever.tokenize(texts[start : start + WINDOW], kind, max_length)

            waiting = ahead.submit(tokenise, starts[0])
            for start in starts:
                tokens = waiting.result()
                if start != starts[-1]:
                    waiting = ahead.submit(tokenise, start + WINDOW)
                yield start, tokens

    def _encode_window(self, tokens: list[list[int]], out: npt.NDArray[np.float32], bar: Progress) -> None:
        lengths = [len(ids) for ids in tokens]
        pending = deque(self._batches(list(range(len(tokens))), lengths))
        results: list[tuple[list[int], torch.Tensor]] = []
        while pending:
            batch = pending.popleft()
            try:
                vectors = self._forward([tokens[i] for i in batch])
                results.append((batch, vectors.float().to("cpu", non_blocking=True)))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve_budget(max(lengths[i] for i in batch), len(batch))
                pending.extendleft(reversed(self._batches(batch, lengths)))
            else:
                self.tokens_seen += sum(lengths[i] for i in batch)
                self._lengths_seen.update(lengths[i] for i in batch)
                bar.advance(len(batch))
        if self.retriever.model.device.type == "cuda":
            torch.cuda.synchronize(self.retriever.model.device)
        for batch, vectors in results:
            out[batch] = vectors.numpy()

    def _batches(self, indices: list[int], lengths: list[int]) -> list[list[int]]:
        chosen = [lengths[i] for i in indices]
        batches = token_budget_batches(chosen, self.token_budget, padded=self._forward.padded)
        return [[indices[place] for place in batch] for batch in batches]

    def _halve_budget(self, longest: int, texts: int) -> None:
        if texts == 1:
            raise TrialFailure(
                f"out of memory with a single text of {longest} tokens; lower max_length or free memory"
            )
        self.token_budget = max(1, min(self.token_budget, longest * texts) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _state(model: torch.nn.Module) -> tuple[object, ...]:
    """Differs after any change of weights (in place or by replacement) and of hooks."""
    weights = tuple((id(p), p.data_ptr(), p._version) for p in model.parameters())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return (*weights, hooks)


def _is_hooked(model: torch.nn.Module) -> bool:
    """Hooks (gates, statistics) act in the model's own forward only."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def as_encoder(model: str | Path | Retriever | Encoder) -> Encoder:
    """An encoder on this machine's device for whatever form a model is given in."""
    if isinstance(model, Encoder):
        return model
    if isinstance(model, Retriever):
        return Encoder(model)
    hardware = detect()
    return Encoder(load_retriever(model, dtype=hardware.dtype, device=hardware.device))
