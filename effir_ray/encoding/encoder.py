"""Texts to embeddings: token-budget batches, tokenisation one window ahead, rows in input order."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from effir_ray.encoding.batching import token_budget_batches
from effir_ray.encoding.cpu_kernels import build
from effir_ray.encoding.packed import PackedForward, packed_forward
from effir_ray.encoding.padded import PaddedForward
from effir_ray.encoding.probe import PROBE
from effir_ray.errors import InputError, TrialFailure
from effir_ray.hardware import PINNED, Computed, Precision, detect, pinned_precision
from effir_ray.models.accounting import flops
from effir_ray.models.folder import TextKind
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.progress import Progress
from effir_ray.progress import progress as show

WINDOW = 512  # texts that are tokenised ahead and ordered by length together
_CHECKED = 8
_CLOSE = {"float32": 0.99999, "bfloat16": 0.999, "int8": 0.98}  # what is usual, of cosines to float32
_CHOSEN = 0.9999
"""Mean cosine to float32 from which on bfloat16 is chosen where nobody asked for it."""

_BUDGET = {"cpu": 1024, "cuda": 32_768}
"""Tokens a batch. CPU: the activations of more no longer fit the caches; GPU: enough to fill it."""


class Encoder:
    """Embeds texts with one model; holds its own, faster copy of the weights.

    ``precision``: what is multiplied in. None chooses: on CPUs bfloat16 where ``hardware.detect`` finds it
    faster and the embeddings keep a mean cosine of 0.9999 to float32's, else float32, unless
    ``EFFIR_RAY_PRECISION`` says it; on GPUs the model's own type, which is all there is there.
    ``token_budget`` (tokens a batch) halves by itself when memory runs out
    and stays there. ``cosine``: how close embeddings come to the model's own, where it was looked at: a mean
    over the first texts encoded, or over those it was chosen by; else None. A RuntimeWarning says when it is
    lower than usual. Raises InputError for a precision that this model does not have here.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        token_budget: int | None = None,
        precision: Precision | None = None,
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise InputError(f"token_budget is {token_budget}; expected at least 1 token")
        if precision not in (None, *_CLOSE):
            raise InputError(f"precision is '{precision}'; expected float32, bfloat16 or int8")
        self.retriever = retriever
        self.token_budget = token_budget or _BUDGET[retriever.model.device.type]
        self._asked = precision
        self.precision: Computed
        self.cosine: float | None = None
        self.tokens_seen = 0  # over all calls
        self._lengths_seen: Counter[int] = Counter()  # texts by their number of tokens
        self._forward: PackedForward | PaddedForward
        self._watched: _Watched | None = None
        self._refresh()

    @property
    def chosen(self) -> bool:
        """Whether nobody asked for its precision."""
        return self._asked is None

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.retriever.dimension

    @property
    def warning(self) -> str:
        """What there is to say when embeddings are far from the model's own; else ''."""
        usual = _CLOSE.get(self.precision, 0.0)
        if self.cosine is None or self.cosine >= usual:
            return ""
        return (
            f"{self.precision} changes the embeddings of '{self.retriever.name}': mean cosine to its own "
            f"{self.cosine:.4f} (at least {usual} is usual); check its scores or choose another precision"
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
        assert self._watched is not None
        on_cpu = self.retriever.model.device.type == "cpu"
        with display as bar, torch.inference_mode(), self._watched.evaluating():
            for start, tokens in self._tokenised(texts, kind, max_length):
                if self._asked not in (None, "float32") and self.cosine is None and on_cpu:
                    self._check(tokens[:_CHECKED])
                self._encode_window(tokens, embeddings[start : start + len(tokens)], bar)
        return embeddings

    def _refresh(self) -> None:
        """Choose the forward pass, anew when the model was changed: trained on, pruned, masked by hooks."""
        if self._watched is not None and self._watched.unchanged():
            return
        model = self.retriever.model
        self._watched, self.cosine = _Watched(model), None
        if self._watched.hooked:
            self._use("float32", None)
        elif model.device.type != "cpu":
            self._use("float32", packed_forward(self.retriever, "float32"))
        elif self._asked is not None:
            self._use(self._asked, packed_forward(self.retriever, self._asked))
        else:
            self._choose()
        if self._asked not in (None, self.precision):
            here = f"kernels {build().reason}" if model.device.type == "cpu" else f"loaded in {model.dtype}"
            raise InputError(
                f"{self._asked} is for unmodified models on CPUs that have it and the compiled kernels; "
                f"'{self.retriever.name}' is a {model.config.model_type} on {model.device.type}, {here}"
            )

    def _choose(self) -> None:
        """What this CPU is fast in, where it changes next to nothing or the environment says so."""
        fastest, pinned = detect().precision, pinned_precision()
        if fastest != "float32":
            forward = packed_forward(self.retriever, fastest)
            if forward is not None:
                self._use(fastest, forward)
                if pinned or self._stays_close():
                    return
            elif pinned:
                reason = f"{PINNED} is {pinned}, and this computes in float32: kernels {build().reason}"
                warnings.warn(reason, RuntimeWarning, stacklevel=4)
        self._use("float32", packed_forward(self.retriever, "float32"))

    def _use(self, precision: Precision, forward: PackedForward | None) -> None:
        """``forward``, or the model's own, which multiplies in its weights' type, as all do on GPUs."""
        own: dict[torch.dtype, Computed] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
        on_cpu = self.retriever.model.device.type == "cpu"
        of_weights = own.get(self.retriever.model.dtype, "float32")
        self.precision = precision if forward and on_cpu else of_weights
        self._forward = forward or PaddedForward(self.retriever)

    def _stays_close(self) -> bool:
        """Whether what nobody asked for changes next to nothing."""
        with torch.inference_mode(), self._watched.evaluating() if self._watched else nullcontext():
            self.cosine = self._mean_cosine(self.retriever.tokenize(PROBE, "document"))
        if self.cosine >= _CHOSEN:
            return True
        self.cosine = None
        return False

    def _mean_cosine(self, tokens: list[list[int]]) -> float:
        exact = PaddedForward(self.retriever)
        pairs = [(self._forward([ids]), exact([ids])) for ids in tokens]
        cosines = [torch.nn.functional.cosine_similarity(a, b.float()).item() for a, b in pairs]
        return sum(cosines) / len(cosines)

    def _check(self, tokens: list[list[int]]) -> None:
        """Some models lose much: huge activations of a few channels leave little of the rest in 8 bits."""
        self.cosine = self._mean_cosine(tokens)
        if self.warning:
            warnings.warn(self.warning, RuntimeWarning, stacklevel=3)

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
                bar.advance(len(batch), precision=self.precision)
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


class _Watched:
    """What a forward pass was made from, and whether it is still so. Asked before every text that comes
    alone, so it looks things up instead of walking through the modules."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = list(model.modules())
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooked = any(self._hooks)  # gates and statistics act in the model's own forward only
        self._hook_counts = [len(hooks) for hooks in self._hooks]
        self._owners = [owner for m in self._modules for owner in (m._parameters, m._modules)]
        self._held = self._now_held()  # by identity, and alive as long as this is
        self._kept = [value for owner in self._owners for value in owner.values()]
        self._weights = list(model.parameters())
        self._versions = self._now_versions()

    def unchanged(self) -> bool:
        """Whether hooks, modules and weights (in place or by replacement) are as they were."""
        return (
            list(map(len, self._hooks)) == self._hook_counts
            and self._now_held() == self._held
            and self._now_versions() == self._versions
        )

    def _now_held(self) -> list[int]:
        return [id(value) for owner in self._owners for value in owner.values()]

    def _now_versions(self) -> list[tuple[int, int]]:
        return [(weight._version, weight.data_ptr()) for weight in self._weights]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, and afterwards as it was."""
        training = [module for module in self._modules if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def as_encoder(model: str | Path | Retriever | Encoder, *, precision: Precision | None = None) -> Encoder:
    """An encoder on this machine's device for whatever form a model is given in; one that is one already
    keeps its own precision. On GPUs a model that is given by name is loaded in ``precision``.
    """
    if isinstance(model, Encoder):
        return model
    if isinstance(model, Retriever):
        return Encoder(model, precision=precision)
    hardware = detect()
    by_weights = hardware.device == "cuda" and precision in ("float32", "bfloat16")
    loaded_in = precision if by_weights and precision else hardware.dtype
    return Encoder(load_retriever(model, dtype=loaded_in, device=hardware.device), precision=precision)


def comparable(encoders: Mapping[str, Encoder]) -> dict[str, Encoder]:
    """The same, but where some chose another precision than others, all that chose compute in float32: a
    model would seem twice as fast as one that differs from it by a block.
    """
    if len({encoder.precision for encoder in encoders.values() if encoder.chosen}) <= 1:
        return dict(encoders)
    return {
        name: Encoder(encoder.retriever, precision="float32") if encoder.chosen else encoder
        for name, encoder in encoders.items()
    }
