"""The compiled kernels of passes on CPUs: built for the processor at hand, once, and called on torch tensors.

``cpu_kernels.cpp`` knows nothing of torch: it is compiled in a few seconds by the system's C++ compiler into
the user's cache folder and loaded through ctypes. It brings no OpenMP library of its own but finds torch's,
so that both share one pool of threads.

Shapes: t tokens of all n texts, h hidden, q query heads, k key-value heads, d channels a head.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from effir_ray.caches import cache_folder
from effir_ray.hardware import compiler, cpu_features

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
READABLE = (torch.float32, torch.bfloat16)
"""Types of tables of embeddings."""

_ACTIVATION = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3}
LOWEST = {"gelu": 0.1700, "gelu_tanh": 0.1701, "silu": 0.2785, "relu": 0.0}
"""How far below zero an activation goes at most."""

EVERYTHING = 2**30  # tokens to one side: no window


class Heads(ctypes.Structure):
    """What a layer's attention is for every batch; ``cpu_kernels.cpp`` says what each field means."""

    _fields_ = (
        ("queries", ctypes.c_int32),
        ("keys", ctypes.c_int32),
        ("channels", ctypes.c_int32),
        ("left", ctypes.c_int32),
        ("right", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
    )


class Weights(ctypes.Structure):
    """The weights of a product, as they lie, and what becomes of its sums."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
    )


class NormFields(ctypes.Structure):
    """A norm over the rows of a matrix: kind 0 none, 1 LayerNorm, 2 RMSNorm."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class SublayerFields(ctypes.Structure):
    """An attention or an MLP with all that it points at; ``cpu_kernels.cpp`` says what each field means."""

    _fields_ = (
        ("attends", ctypes.c_int32),
        ("rotary", ctypes.c_int32),
        ("has_after", ctypes.c_int32),
        ("lowest", ctypes.c_float),
        ("first_times", ctypes.c_void_p),
        ("second_times", ctypes.c_void_p),
        ("heads", Heads),
        ("first", Weights),
        ("second", Weights),
        ("before", NormFields),
        ("inner", NormFields),
        ("after", NormFields),
    )


@dataclass(frozen=True)
class Rows:
    """A matrix (t, i) as products take it: float32, bfloat16, or bytes with a scale a row."""

    values: Tensor
    scale_t: Tensor | None = None


class Kernels:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.has_bfloat16 = bool(library.effir_has_bfloat16())
        self.has_bytes = bool(library.effir_has_bytes())
        self.panel = int(library.effir_panel())  # columns of weights that lie together
        pointer, whole, long, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
        arguments = {
            "multiply": [
                *(whole, pointer, pointer, long, whole, pointer, whole, pointer),
                *(pointer, pointer, whole, whole, pointer, whole, whole, whole),
            ],
            "attend": [
                *(pointer, pointer, whole, pointer, whole, pointer),
                *(pointer, pointer, whole, pointer, whole),
            ],
            "join": [
                *(pointer, whole, pointer, long, whole, pointer, pointer),
                *(whole, pointer, whole, pointer, pointer, whole),
            ],
            "to_bytes": [pointer, whole, long, whole, real, pointer, pointer, pointer, whole],
            "embed": [
                *(pointer, whole, pointer, pointer, pointer, pointer),
                *(long, whole, real, pointer, whole),
            ],
            "pass": [
                *(pointer, whole, whole, whole, pointer, long, whole, pointer, whole, pointer),
                *(pointer, pointer, pointer, pointer, pointer, whole),
            ],
            "mean": [pointer, pointer, long, whole, pointer, whole],
        }
        for name, types in arguments.items():
            function = getattr(library, f"effir_{name}")
            function.restype, function.argtypes = ctypes.c_int if name == "pass" else None, types

    def multiplies(self, precision: str) -> bool:
        """Whether this processor has products of that type."""
        return {"float32": True, "bfloat16": self.has_bfloat16, "int8": self.has_bytes}.get(precision, False)

    def run(
        self,
        sublayers: ctypes.Array[SublayerFields],
        last: int,
        activations: torch.dtype,
        stream_th: Tensor,
        bounds: Tensor,
        rows_n: Tensor | None,
        rotations: Sequence[tuple[Tensor, Tensor]],
        final: NormFields,
    ) -> Tensor:
        """The whole pass: ``final`` of the stream after all sublayers, (t, h), or of the tokens at ``rows_n``
        alone, which are all that is computed from sublayer ``last`` on, (n, h). Uses up ``stream_th``. Raises
        RuntimeError where memory runs out, in torch's words.
        """
        texts = bounds.shape[0] - 1
        t, h = stream_th.shape
        out = torch.empty(t if rows_n is None else texts, h)
        tables = ctypes.c_void_p * max(1, len(rotations))
        cos, sin = (tables(*(pair[part].data_ptr() for pair in rotations)) for part in (0, 1))
        turned = (ctypes.c_int32 * max(1, len(rotations)))(*(pair[0].shape[-1] for pair in rotations))
        failed = self._library.effir_pass(
            ctypes.addressof(sublayers),
            len(sublayers),
            last,
            _KIND[activations],
            stream_th.data_ptr(),
            t,
            h,
            bounds.data_ptr(),
            texts,
            address(rows_n),
            ctypes.addressof(cos),
            ctypes.addressof(sin),
            ctypes.addressof(turned),
            ctypes.addressof(final),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise RuntimeError(f"can't allocate memory for the activations of {t} tokens")
        return out

    def multiply(self, x: Rows, weights: Weights, out: torch.dtype) -> Tensor:
        """activation(x W^T + bias), (t, width). ``out``: the type of ``x``, of bytes float32 or bfloat16."""
        values = x.values
        written = torch.empty(values.shape[0], weights.width, dtype=out)
        self._library.effir_multiply(
            weights.kind,
            values.data_ptr(),
            address(x.scale_t),
            values.shape[0],
            weights.steps,
            weights.panels,
            weights.columns,
            weights.bias,
            weights.scale,
            weights.zero,
            weights.activation,
            weights.gated,
            written.data_ptr(),
            _KIND[out],
            weights.width,
            torch.get_num_threads(),
        )
        return written

    def attend(
        self,
        heads: Heads,
        qkv: Tensor,
        bounds: Tensor,
        rows_n: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Softmax attention inside each text, (t, q d), or of the tokens at ``rows_n``, one of each text.

        qkv: (t, (q + 2 k) d). bounds: (n + 1,) int32. rows_n: (n,) int64. rotation: cos and sin, (t, turned
        channels / 2).
        """
        texts = bounds.shape[0] - 1
        asking = qkv.shape[0] if rows_n is None else texts
        out = torch.empty(asking, heads.queries * heads.channels, dtype=qkv.dtype)
        self._library.effir_attend(
            ctypes.addressof(heads),
            qkv.data_ptr(),
            _KIND[qkv.dtype],
            bounds.data_ptr(),
            texts,
            address(rows_n),
            *((None, None, 0) if rotation is None else (*map(address, rotation), rotation[0].shape[-1])),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def join(
        self,
        added_th: Tensor | None,
        stream_th: Tensor,
        inner: NormFields,
        outer: NormFields,
        *,
        post: bool,
        out: torch.dtype | None,
        times: Tensor | None = None,
    ) -> Rows | None:
        """stream += inner(added), in place; returns outer(stream) as ``out``, which also becomes the stream
        where ``post``. Without ``added_th`` only the second. ``times``: see ``to_bytes``.
        """
        t, h = stream_th.shape
        written = None if out is None else _empty(t, h, out)
        self._library.effir_join(
            address(added_th),
            0 if added_th is None else _KIND[added_th.dtype],
            stream_th.data_ptr(),
            t,
            h,
            ctypes.addressof(inner),
            ctypes.addressof(outer),
            int(post),
            None if written is None else written.values.data_ptr(),
            0 if out is None else _KIND[out],
            None if written is None else address(written.scale_t),
            address(times),
            torch.get_num_threads(),
        )
        return written

    def to_bytes(self, x_ti: Tensor, lowest: float = 0.0, times: Tensor | None = None) -> Rows:
        """x * times = scale * (bytes - 128), with a scale a row and ``times`` (i,); of what is never below
        ``-lowest`` (x + lowest) * times = scale * bytes.
        """
        t, columns = x_ti.shape
        written = _empty(t, columns, torch.uint8)
        self._library.effir_to_bytes(
            x_ti.data_ptr(),
            _KIND[x_ti.dtype],
            t,
            columns,
            lowest,
            address(times),
            written.values.data_ptr(),
            address(written.scale_t),
            torch.get_num_threads(),
        )
        return written

    def embed(
        self,
        tokens: Tensor,
        ids_t: Tensor,
        places: Tensor | None,
        positions_t: Tensor,
        everywhere: Tensor | None,
        scale: float,
    ) -> Tensor:
        """scale * tokens[ids] + places[positions] + everywhere[0], (t, h) float32."""
        t, h = len(ids_t), tokens.shape[1]
        out = torch.empty(t, h)
        self._library.effir_embed(
            tokens.data_ptr(),
            _KIND[tokens.dtype],
            ids_t.data_ptr(),
            address(places),
            positions_t.data_ptr(),
            address(everywhere),
            t,
            h,
            scale,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def mean(self, x_th: Tensor, bounds: Tensor) -> Tensor:
        """(t, h) float32 -> (n, h): the mean over the tokens of each text."""
        out = torch.empty(len(bounds) - 1, x_th.shape[1])
        self._library.effir_mean(
            x_th.data_ptr(),
            bounds.data_ptr(),
            len(out),
            x_th.shape[1],
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def weights_of(
    panels: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    zero: Tensor | None,
    activation: Activation | None,
    *,
    gated: bool,
    width: int,
) -> Weights:
    """Fields that point at these tensors, which must outlive them. panels: (panels, steps, elements that one
    step of one panel multiplies)."""
    count, steps, _ = panels.shape
    return Weights(
        _KIND.get(panels.dtype, 2),  # signed bytes multiply unsigned ones
        steps,
        count * panels[0, 0].nbytes // 4,
        -1 if activation is None else _ACTIVATION[activation],
        int(gated),
        width,
        panels.data_ptr(),
        *map(address, (bias, scale, zero)),
    )


def address(tensor: Tensor | None) -> int | None:
    """For a field that points at it, or at nothing; the tensor must outlive that."""
    return None if tensor is None else tensor.data_ptr()


def _empty(t: int, columns: int, dtype: torch.dtype) -> Rows:
    return Rows(torch.empty(t, columns, dtype=dtype), torch.empty(t) if dtype == torch.uint8 else None)


@dataclass(frozen=True)
class Build:
    """``kernels`` is None where they cannot be had; ``reason`` says why, or where they lie."""

    kernels: Kernels | None
    reason: str


@lru_cache(maxsize=1)
def build() -> Build:
    """The kernels, compiled at the first call on this kind of processor."""
    found = compiler()
    if found is None:
        return Build(None, "no C++ compiler; install g++ for faster encoding")
    try:
        version = _run([*shlex.split(found), "--version"])
        identity = "\0".join((_SOURCE.read_text(), *_FLAGS, version, *sorted(cpu_features())))
        library = cache_folder() / "kernels" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if not library.is_file():
            compile_into(library, found)
        if library.stat().st_uid not in (os.getuid(), 0):  # it would run as this user
            return Build(
                None, f"{library} belongs to another user; set EFFIR_RAY_CACHE to a folder of your own"
            )
        return Build(Kernels(ctypes.CDLL(str(library))), f"compiled by {found}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return Build(None, f"{found} does not compile them: {output.strip().splitlines()[0][:200]}")


def compile_into(library: Path, command: str, *, march: str = "native") -> None:
    """Aside and then renamed, since several processes may do it at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    wide = ["-mprefer-vector-width=512"] if march == "native" and "avx512f" in cpu_features() else []
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part, whole = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _run([*shlex.split(command), *_FLAGS, f"-march={march}", *wide, "-c", "-o", part, _SOURCE])
        _run(
            [*shlex.split(command), "-shared", "-o", whole, part]
        )  # without -fopenmp: its symbols are torch's
        whole.replace(library)


def _run(command: Sequence[Any]) -> str:
    done = subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout
