"""Headers of weight files; the damaged ones are in ``test_bad_inputs``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from effir_ray.models.names import resolve
from effir_ray.models.weight_files import gguf_settings, model_tensors


def test_headers_of_weights_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = model_tensors(tmp_path)
    assert {name: (header.dtype, header.shape) for name, header in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "c": ("F32", (0, 5)),
    }
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_tensors(tmp_path) == found


def test_the_header_of_a_real_gguf_file_is_read() -> None:
    file = resolve("smollm2-135m").path
    assert file is not None
    settings, elements = gguf_settings(file)
    assert (settings["llama.block_count"], settings["llama.embedding_length"]) == (30, 576)
    assert 134_000_000 < elements < 135_000_000
