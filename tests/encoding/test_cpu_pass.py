"""The compiled kernels against torch, on every instruction set that they can be built for here."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from effir_ray.encoding import cpu_kernels
from effir_ray.encoding.cpu_kernels import Heads, Kernels, Rows, build, compile_into
from effir_ray.encoding.cpu_pass import CpuModel
from effir_ray.encoding.cpu_products import AmxProduct, Linear, PanelProduct
from effir_ray.encoding.packed import PackedForward
from effir_ray.encoding.padded import PaddedForward
from effir_ray.encoding.sublayers import Gate
from effir_ray.hardware import compiler, cpu_features
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import load_retriever

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

ON_X86 = platform.machine() == "x86_64"
DRAW = torch.Generator()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    DRAW.manual_seed(0)


@pytest.fixture(scope="module", params=["native", "alderlake", "x86-64-v3", "x86-64"])
def kernels(request, tmp_path_factory) -> Kernels:
    """Vectors of 16 numbers where there is AVX-512, of 8 with and without products of bytes, and what a
    compiler makes of 8 without AVX."""
    if request.param == "native":
        found = build().kernels
        assert found is not None, build().reason
        return found
    if not ON_X86 or (request.param == "alderlake" and "avx_vnni" not in cpu_features()):
        pytest.skip("for x86-64 (and its AVX-VNNI)")
    library = tmp_path_factory.mktemp(request.param) / "kernels.so"
    compile_into(library, str(compiler()), march=request.param)
    return Kernels(ctypes.CDLL(str(library)))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW)


def types_of(kernels: Kernels) -> list[torch.dtype]:
    return [torch.float32] + [torch.bfloat16] * kernels.has_bfloat16


ACTIVATED = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


@pytest.mark.parametrize("shape", [(1, 8, 5), (7, 64, 64), (100, 36, 130), (200, 100, 48)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [None, *ACTIVATED])
def test_products(kernels, shape, gated, activation):
    t, inputs, outputs = shape
    if gated and activation is None:
        return
    halves = 2 if gated else 1
    weight, bias, x = (
        drawn(halves * outputs, inputs) / inputs**0.5,
        drawn(halves * outputs),
        2 * drawn(t, inputs),
    )
    then = None if activation is None else Gate(activation=activation, gated=gated)
    linear = Linear(weight=weight, bias=bias, then=then)

    def expected(x, weight):
        sums = x @ weight.T + bias
        if then is None:
            return sums
        gate, up = sums.chunk(2, dim=1) if gated else (sums, 1)
        return ACTIVATED[activation](gate) * up

    for dtype in types_of(kernels):
        got = PanelProduct(linear, kernels, dtype, False)(Rows(x.to(dtype)))
        want = expected(x.to(dtype).float(), weight.to(dtype).float())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[:, :outputs].float(), want, atol=tolerance, rtol=tolerance)
        assert not got[:, outputs:].any()  # what is filled in adds nothing to the next product
    if kernels.has_bytes:
        got = PanelProduct(linear, kernels, torch.float32, True)(kernels.to_bytes(x))
        assert F.cosine_similarity(got[:, :outputs], expected(x, weight)).min() > 0.995


def test_bytes_hold_rows_as_near_as_they_can(kernels):
    x = drawn(9, 77) * torch.logspace(-3, 3, 9)[:, None]
    rows = kernels.to_bytes(x)
    back = rows.scale_t[:, None] * (rows.values.float() - 128)
    torch.testing.assert_close(rows.scale_t, x.abs().amax(dim=1) / 127)
    assert ((back - x).abs() <= rows.scale_t[:, None] * 0.501).all()
    positive, times = F.gelu(x), drawn(77).abs() + 0.1
    rows = kernels.to_bytes(positive, 0.17, times)
    back = rows.scale_t[:, None] * rows.values.float() / times - 0.17
    assert ((back - positive).abs() <= rows.scale_t[:, None] / times * 0.501 + 1e-6).all()


def test_channels_that_are_always_large_go_over_to_the_weights():
    """What is multiplied before and divided after changes nothing but what rounding takes away."""
    kernels = build().kernels
    if kernels is None or not kernels.has_bytes:
        pytest.skip("the processor has no products of bytes")
    x = F.gelu(drawn(50, 64)) * torch.logspace(-1, 2, 64)
    weight = drawn(64, 64)
    exact = x @ weight.T

    def error(lowest: float, times: torch.Tensor | None) -> float:
        linear = Linear(weight=weight, lowest=lowest, times=times)
        got = PanelProduct(linear, kernels, torch.float32, True)(kernels.to_bytes(x, lowest, times))
        return ((got - exact).norm() / exact.norm()).item()

    times = 1 / x.abs().amax(dim=0) ** 0.5
    assert error(0.0, times) < 0.75 * error(0.0, None) < 0.05
    # What bytes count from has a part in every sum, which a bias takes away again.
    x = x.abs() - 0.5
    exact = x @ weight.T
    assert error(0.5, times) < 0.02


@pytest.mark.parametrize("channels", [16, 20, 32, 64, 128])
@pytest.mark.parametrize("sight", ["both", "causal", "window", "causal window"])
@pytest.mark.parametrize("shared", [False, True])
def test_attention(kernels, channels, sight, shared):
    """Texts of one token, of a block, and of more than a chunk of keys."""
    queries, keys, lengths = 4, 2 if shared else 4, [600, 257, 24, 3, 1]
    left = 40 if "window" in sight else cpu_kernels.EVERYTHING
    right = 0 if "causal" in sight else left
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    qkv = drawn(sum(lengths), (queries + 2 * keys) * channels)
    scale = channels**-0.5 * np.log2(np.e)
    heads = Heads(queries, keys, channels, left, right, scale, 0.0, None, None, 0.0)
    cos, sin = (f(drawn(sum(lengths), channels // 2)) for f in (torch.cos, torch.sin))

    def turned(x):
        low, high = x.chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([low * c - high * s, high * c + low * s], dim=-1)

    parts = qkv.view(len(qkv), -1, channels).split([queries, keys, keys], dim=1)
    query, key, value = turned(parts[0]), turned(parts[1]), parts[2]
    expected = []
    for start, length in zip(bounds.tolist(), lengths, strict=False):
        q, k, v = (x[start : start + length].transpose(0, 1)[None] for x in (query, key, value))
        place = torch.arange(length)
        distance = place[None] - place[:, None]  # of a key from a query
        seen = (distance <= right) & (distance >= -left)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        expected.append(out[0].transpose(0, 1).flatten(1))
    want = torch.cat(expected)
    last = bounds[1:].long() - 1
    for dtype in types_of(kernels):
        for rows in (None, last):
            got = kernels.attend(heads, qkv.to(dtype), bounds, rows, (cos, sin)).float()
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            wanted = want if rows is None else want[rows]
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", RANDOM_MODELS)
def test_a_pass_is_the_model_s_own(kernels, family):
    retriever = load_retriever(f"random:{family}")
    texts = [list(range(3, 3 + n)) for n in (300, 41, 17, 2, 1)]
    forward = PackedForward(retriever, CpuModel(retriever, "float32", kernels))
    exact = PaddedForward(retriever)
    with torch.inference_mode():
        torch.testing.assert_close(forward(texts), exact(texts), atol=2e-5, rtol=0)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "then", [None, Gate(activation="gelu", gated=False), Gate(activation="silu", gated=True)]
)
def test_one_dnn_multiplies_alike_where_it_knows_more(quantized, then):
    """AMX is nowhere tested: what is there besides is the same product."""
    kernels = build().kernels
    if kernels is None or (quantized and not kernels.has_bytes):
        pytest.skip("the processor has no products of bytes")
    lowest = 0.17 if quantized else 0.0
    linear = Linear(weight=drawn(128, 64) / 8, bias=drawn(128), then=then, lowest=lowest)
    x = F.gelu(drawn(33, 64))
    rows = kernels.to_bytes(x, lowest) if quantized else Rows(x)
    ours = PanelProduct(linear, kernels, torch.float32, quantized)(rows)
    theirs = AmxProduct(linear, torch.float32, quantized)(rows)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_without_a_compiler_there_is_a_reason(monkeypatch, tmp_path):
    for command, reason in (("", "no C++ compiler"), ("/bin/false", "/bin/false does not compile")):
        build.cache_clear()
        monkeypatch.setattr(cpu_kernels, "compiler", lambda command=command: command or None)
        monkeypatch.setenv("EFFIR_RAY_CACHE", str(tmp_path))
        found = build()
        assert found.kernels is None and reason in found.reason
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    build.cache_clear()


def test_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFIR_RAY_CACHE", str(tmp_path))
    build.cache_clear()
    assert build().kernels is not None
    (library,) = tmp_path.rglob("*.so")
    assert library.parent == tmp_path / "kernels" and [library] == list(library.parent.iterdir())
    build.cache_clear()
    monkeypatch.setattr(cpu_kernels, "compile_into", None)
    assert build().kernels is not None
    build.cache_clear()


def test_memory_that_runs_out_is_an_error_of_torch_s_words():
    """An encoder then halves its batches."""
    script = """
import resource, torch
from effir_ray.encoding.cpu_kernels import build
from effir_ray.encoding.cpu_pass import CpuModel
from effir_ray.encoding.packed import PackedForward
from effir_ray.models.retriever import load_retriever
retriever = load_retriever("random:llama")
forward = PackedForward(retriever, CpuModel(retriever, "float32", build().kernels))
texts = [[5] * 400] * 1500
with torch.inference_mode():
    forward([[5]])
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, -1))
    try:
        forward(texts)
    except RuntimeError as error:
        print("can't allocate memory" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_a_library_of_another_user_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFIR_RAY_CACHE", str(tmp_path))
    build.cache_clear()
    assert build().kernels is not None
    build.cache_clear()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    (library,) = tmp_path.rglob("*.so")
    if library.stat().st_uid == 0:  # root's are anyone's: give it to another
        os.chown(library, owner + 2, -1)
    assert build().kernels is None and "belongs to another user" in build().reason
    build.cache_clear()


def test_what_is_built_is_packaged():
    source = Path(cpu_kernels.__file__).with_name("cpu_kernels.cpp")
    listed = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert source.is_file() and "encoding/cpu_kernels.cpp" in listed
