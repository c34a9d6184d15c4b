"""One query at a time on a GPU: the packed pass is recorded once and then started as a whole.

A pass over a short text is hundreds of kernels that run for a few microseconds each: launching them one by
one takes longer than running them. A CUDA graph launches them all at once, but only with the shapes it was
recorded with, so a text is filled up to its length class. The filling is a second, separate text of the same
packed pass: no mask, and the first text's embedding is what it would be alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effir_ray.encoding.varlen_attention import Packing

LENGTH_CLASSES = (16, 32, 64, 128, 256)
"""Longer texts keep a GPU busy without help."""

_AGREEMENT = 0.99
"""Least cosine between a recording's first result and the ordinary pass: half precision differs a little in
products of another shape, a wrong recording a lot."""

Embed = Callable[[Tensor, Packing], Tensor]  # token ids (t,), where the texts lie -> embeddings (n, d)


def length_class(length: int) -> int | None:
    """The smallest class with room for at least one token of filling; None for a text too long for any."""
    return next((size for size in LENGTH_CLASSES if length < size), None)


class FilledText:
    """Input of the packed pass for one text of any length below ``size``, always in the same memory."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        # One buffer, hence one copy to the GPU a text: ids, positions, bounds, lengths.
        self._buffer = torch.zeros(2 * size + 5, dtype=torch.long, device=device)

    def write(self, ids: Sequence[int]) -> None:
        """Make ``ids`` the first of the two texts."""
        length, size = len(ids), self._size
        values = torch.zeros(2 * size + 5, dtype=torch.long)
        values[:length] = torch.tensor(ids)
        values[size : size + length] = torch.arange(length)  # the filling stays at position 0
        values[2 * size :] = torch.tensor([0, length, size, length, size - length])
        if self._buffer.is_cuda:
            values = values.pin_memory()
        self._buffer.copy_(values, non_blocking=True)

    def read(self) -> tuple[Tensor, Packing]:
        """Token ids (size,) and the packing of both texts, computed from the buffer as it is then."""
        size = self._size
        ids, positions, bounds, lengths = torch.split(self._buffer, [size, size, 3, 2])
        # On GPUs only the longest of ``lengths`` counts, and it must hold for every text of the class.
        return ids, Packing((size, 0), lengths, bounds.int(), positions)


class SingleTextGraphs:
    """A packed pass over one text, as a CUDA graph a length class. Falls back to the pass itself, for the
    rest of the process and with a warning, where recording fails or does not reproduce it.
    """

    _usable = True  # of the class: a recording that failed may leave torch's allocator in the middle of one

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: dict[int, tuple[FilledText, torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, ids: Sequence[int], embed: Embed) -> Tensor:
        """(1, d). ``embed`` is always the same; it is not kept, so that whoever owns it can be freed."""
        size = length_class(len(ids))
        if size is None or not SingleTextGraphs._usable:
            return self._alone(ids, embed)
        if size not in self._recorded:
            expected = self._alone(ids, embed)
            try:
                # Recorded with another text: what a recording took for constant then shows.
                self._recorded[size] = self._record(size, ids[:1], embed)
                _check(self._replay(size, ids), expected)
            except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts that it has it
                SingleTextGraphs._usable = False
                self._recorded.clear()
                warnings.warn(f"no CUDA graphs for single texts: {error}", RuntimeWarning, stacklevel=2)
                return expected
        return self._replay(size, ids)

    def _alone(self, ids: Sequence[int], embed: Embed) -> Tensor:
        return embed(torch.tensor(ids, device=self._device), Packing.of([len(ids)], self._device))

    def _record(
        self, size: int, ids: Sequence[int], embed: Embed
    ) -> tuple[FilledText, torch.cuda.CUDAGraph, Tensor]:
        text = FilledText(size, self._device)
        text.write(ids)
        current = torch.cuda.current_stream(self._device)
        # Not torch's default for recording, which belongs to the device that was current when it was made.
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch has no types for it
        aside.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            try:
                with torch.cuda.stream(aside):  # compiles kernels, reserves workspaces: recordings cannot
                    for _ in range(2):
                        embed(*text.read())
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                with torch.cuda.graph(graph, pool=self._pool, stream=aside):
                    output = embed(*text.read())
            finally:
                torch.cuda.set_stream(current)  # a recording that fails leaves its own
        current.wait_stream(aside)
        return text, graph, output

    def _replay(self, size: int, ids: Sequence[int]) -> Tensor:
        text, graph, output = self._recorded[size]
        text.write(ids)
        graph.replay()
        return output[:1].clone()  # the next replay writes over it


def _check(found: Tensor, expected: Tensor) -> None:
    cosine = float(F.cosine_similarity(found.float(), expected.float()).min())
    if not cosine > _AGREEMENT:
        raise RuntimeError(f"a recorded pass gave another embedding (cosine {cosine:.4f})")
