"""What is chosen on a machine, by what it has."""

from __future__ import annotations

import pytest
import torch

from effir_ray import hardware
from effir_ray.errors import InputError

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decides for itself")


@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    monkeypatch.delenv(hardware.PINNED, raising=False)
    hardware._cpu_precision.cache_clear()
    yield
    hardware._cpu_precision.cache_clear()


@needs_cpu
@pytest.mark.parametrize(
    ("features", "compiler", "ratio", "precision", "reason"),
    [
        ({"avx2"}, "g++", 3.0, "float32", "no products of bfloat16"),
        ({"avx512_bf16"}, "g++", 2.0, "bfloat16", "2.0 times as fast"),
        ({"avx512_bf16"}, "g++", 1.1, "float32", "1.1 times as fast"),
        ({"avx512_bf16"}, None, 2.0, "float32", "needs a C++ compiler"),
    ],
)
def test_bfloat16_where_the_processor_is_faster_in_it(
    monkeypatch, features, compiler, ratio, precision, reason
):
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset(features))
    monkeypatch.setattr(hardware, "compiler", lambda: compiler)
    monkeypatch.setattr(hardware, "_bfloat16_speed", lambda: ratio)
    found = hardware.detect()
    assert (found.precision, found.dtype) == (precision, "float32")
    assert reason in found.reasons["precision"]


@needs_cpu
def test_measured_only_where_there_is_something_to_measure(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(hardware, "_bfloat16_speed", None)
    assert hardware.detect().precision == "float32"


def test_the_measurement_tells_processors_apart():
    faster = hardware._measured_bfloat16_speed()
    assert (faster > hardware._WORTHWHILE) == ("avx512_bf16" in hardware.cpu_features())


def test_measured_once_for_all_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFIR_RAY_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "_measured_bfloat16_speed", lambda: 2.5)
    assert hardware._bfloat16_speed() == 2.5
    monkeypatch.setattr(hardware, "_measured_bfloat16_speed", lambda: 1.0)  # a busy moment
    assert hardware._bfloat16_speed() == 2.5
    (note,) = (tmp_path / "precision").iterdir()
    note.write_text("damaged")
    assert hardware._bfloat16_speed() == 1.0


def test_measuring_leaves_the_threads_alone():
    before = torch.get_num_threads()
    hardware._measured_bfloat16_speed()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("pinned", ["float32", "bfloat16"])
def test_pinned(monkeypatch, pinned):
    monkeypatch.setenv(hardware.PINNED, pinned)
    found = hardware.detect()
    assert found.precision == pinned and hardware.PINNED in found.reasons["precision"]


def test_pinned_to_nonsense(monkeypatch):
    monkeypatch.setenv(hardware.PINNED, "int8")
    with pytest.raises(InputError, match="EFFIR_RAY_PRECISION is 'int8'; expected float32 or bfloat16"):
        hardware.detect()
