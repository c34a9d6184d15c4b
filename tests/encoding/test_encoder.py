"""Encoder: order, batching, prompts, and what happens when memory runs out."""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime
import decimal
import heapq
import random
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from effir_ray import hardware
from effir_ray.compression.quantization import quantize
from effir_ray.compression.surgery import apply_plan
from effir_ray.encoding import cpu_pass, packed
from effir_ray.encoding import encoder as encoder_module
from effir_ray.encoding.cpu_kernels import Build, build
from effir_ray.encoding.encoder import Encoder, comparable
from effir_ray.encoding.gemm_peak import gemm_peak
from effir_ray.encoding.padded import PaddedForward
from effir_ray.errors import InputError, TrialFailure
from effir_ray.models.folder import RetrieverSpec
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import LoraConfig
from effir_ray.training.step.lora import add_lora

needs_bfloat16 = pytest.mark.skipif(
    build().kernels is None or not build().kernels.has_bfloat16, reason="needs AVX512_BF16 and a C++ compiler"
)

TEXTS = [
    "the study of cells and protein",
    "a",
    "results of the search in this document are from the model and the data " * 3,
    "list the value of string",
    "number of the file",
    "the study of cells and protein",
] + [f"query number {i} " + "of the data " * (i % 5) for i in range(12)]


def alone(retriever, texts):
    """The reference: one text at a time through the model's own forward, no padding, no batching."""
    rows = []
    for ids in retriever.tokenize(texts, "document"):
        input_ids = torch.tensor([ids])
        with torch.no_grad():
            hidden = retriever.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        rows.append(retriever.pool(hidden.last_hidden_state, torch.ones_like(input_ids))[0].numpy())
    return np.stack(rows)


@pytest.fixture(params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """What lies between products on CPUs: the compiled kernels, or torch where there is no compiler."""
    if request.param == "torch":
        monkeypatch.setattr(packed, "build", lambda: Build(None, "no C++ compiler"))
        monkeypatch.setattr("effir_ray.encoding.gemm_peak.build", packed.build)
    return request.param


@pytest.mark.parametrize("family", RANDOM_MODELS)
@pytest.mark.parametrize("budget", [16, 100_000])
def test_same_embedding_alone_and_in_any_batch(family, budget, kernels):
    retriever = load_retriever(f"random:{family}")
    got = Encoder(retriever, token_budget=budget).encode(TEXTS, "document")
    np.testing.assert_allclose(got, alone(retriever, TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_an_empty_text_without_special_tokens_has_an_embedding(pooling):
    retriever = load_retriever("random:llama")
    retriever.spec = RetrieverSpec(pooling=pooling, append_eos=False)
    retriever.tokenizer._tokenizer.post_processor = None
    got = Encoder(retriever).encode(["some text", "", "of the data"], "document")
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, alone(retriever, ["some text", "", "of the data"]), atol=1e-5, rtol=0)


COMPRESSED = Plan(
    layers=(
        LayerPlan(mlp=False),
        LayerPlan(attention=False, neurons=tuple(range(0, 128, 2))),
        LayerPlan(attention=False, mlp=False),
        LayerPlan(neurons=(3, 7, 11)),
    )
)


@pytest.mark.parametrize("family", RANDOM_MODELS)
def test_compressed_models(family, kernels):
    retriever = apply_plan(load_retriever(f"random:{family}"), COMPRESSED)
    got = Encoder(retriever, token_budget=200).encode(TEXTS, "document")
    np.testing.assert_allclose(got, alone(retriever, TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "modernbert", "bert"])
@pytest.mark.parametrize("with_attention", [(), (0,), (1, 2), (0, 3)])
def test_layers_after_the_last_attention(family, pooling, with_attention, kernels):
    """What pooling does not read is not computed from there on."""
    retriever = load_retriever(f"random:{family}")
    plan = Plan(layers=tuple(LayerPlan(attention=n in with_attention, mlp=n != 2) for n in range(4)))
    retriever = apply_plan(retriever, plan)
    retriever.spec = retriever.spec.model_copy(update={"pooling": pooling})
    got = Encoder(retriever, token_budget=200).encode(TEXTS, "document")
    np.testing.assert_allclose(got, alone(retriever, TEXTS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("normalize", [True, False])
def test_packed_pooling(family, pooling, normalize, kernels):
    retriever = load_retriever(f"random:{family}")
    retriever.spec = retriever.spec.model_copy(update={"pooling": pooling, "normalize": normalize})
    got = Encoder(retriever).encode(TEXTS, "document")
    np.testing.assert_allclose(got, alone(retriever, TEXTS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("change", ["adapters", "int8"])
def test_adapted_and_quantised_models_take_their_own_forward(family, change):
    retriever = load_retriever(f"random:{family}")
    plain = Encoder(retriever).encode(TEXTS, "document")
    if change == "int8":
        quantize(retriever, "int8")
    else:
        add_lora(retriever, LoraConfig(r=2))
        for name, parameter in retriever.model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.constant_(parameter, 0.05)
    encoder = Encoder(retriever)
    got = encoder.encode(TEXTS, "document")
    assert encoder._forward.padded
    assert np.abs(got - plain).max() > 1e-4
    if change == "adapters":  # activations are quantised a batch as they come: int8 depends on the batch
        np.testing.assert_allclose(got, alone(retriever, TEXTS), atol=3e-5, rtol=1e-5)


def test_no_dropout_in_the_middle_of_a_training():
    retriever = load_retriever("random:bert")
    expected = Encoder(retriever).encode(TEXTS, "document")
    retriever.model.train()
    for module in retriever.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    np.testing.assert_array_equal(Encoder(retriever).encode(TEXTS, "document"), expected)
    assert all(module.training for module in retriever.model.modules())


@pytest.mark.parametrize("family", RANDOM_MODELS)
def test_which_families_are_packed(family, kernels):
    retriever = load_retriever(f"random:{family}")
    everywhere = kernels == "compiled"
    assert Encoder(retriever)._forward.padded is not (everywhere or retriever.family.packing is not None)


def test_follows_weights_and_hooks_that_change_after_it_was_made():
    retriever = load_retriever("random:llama")
    encoder = Encoder(retriever)
    before = encoder.encode(TEXTS, "document")
    with torch.no_grad():
        retriever.model.layers[1].mlp.down_proj.weight.mul_(-2)
    trained = encoder.encode(TEXTS, "document")
    assert np.abs(trained - before).max() > 1e-2
    np.testing.assert_allclose(trained, alone(retriever, TEXTS), atol=1e-5, rtol=0)
    handle = retriever.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: (args[0] * 0,))
    np.testing.assert_allclose(encoder.encode(TEXTS, "document"), alone(retriever, TEXTS), atol=1e-5, rtol=0)
    handle.remove()
    np.testing.assert_allclose(encoder.encode(TEXTS, "document"), trained, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bert"])
def test_int8_is_close_and_does_not_depend_on_the_batch(family, kernels):
    retriever = load_retriever(f"random:{family}")
    exact = Encoder(retriever).encode(TEXTS, "document")
    encoder = Encoder(retriever, precision="int8")
    got = encoder.encode(TEXTS, "document")
    assert (got * exact).sum(axis=1).min() > 0.99
    one_by_one = np.concatenate([encoder.encode([text], "document") for text in TEXTS])
    assert (got * one_by_one).sum(axis=1).min() > 0.9999


@needs_bfloat16
def test_int8_is_smoothed(monkeypatch):
    """A channel that is large in every text leaves the others their bits."""
    retriever = load_retriever("random:llama")
    with torch.no_grad():
        for layer in retriever.model.layers:
            layer.input_layernorm.weight[5] = layer.post_attention_layernorm.weight[5] = 60
    exact = Encoder(retriever).encode(TEXTS, "document")

    def closeness() -> float:
        return (Encoder(retriever, precision="int8").encode(TEXTS, "document") * exact).sum(axis=1).min()

    smoothed = closeness()
    monkeypatch.setattr(cpu_pass, "smoothing", lambda _, parts: [(None, None)] * len(parts))
    assert smoothed > 0.99 and 1 - smoothed < 0.5 * (1 - closeness())


@pytest.mark.filterwarnings("error")
def test_int8_that_is_close_is_checked_in_silence():
    encoder = Encoder(load_retriever("random:llama"), precision="int8")
    assert encoder.cosine is None
    encoder.encode(TEXTS, "document")
    assert encoder.cosine > 0.99 and encoder.warning == ""


def with_a_massive_activation():
    """One channel that carries nothing leaves little of the others in few bits."""
    retriever = load_retriever("random:llama")
    with torch.no_grad():
        retriever.model.embed_tokens.weight[:, 5] = 3000
        for layer in retriever.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.fill_(3000)
            attention, mlp = layer.self_attn, layer.mlp
            readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
            for linear in readers:
                linear.weight[:, 5] = 0
        retriever.model.norm.weight[5] = 0
    return retriever


def test_int8_that_is_not_close_says_so(kernels, monkeypatch):
    monkeypatch.setattr(
        cpu_pass, "smoothing", lambda _, parts: [(None, None)] * len(parts)
    )  # which would help
    encoder = Encoder(with_a_massive_activation(), precision="int8")
    with pytest.warns(RuntimeWarning, match="int8 changes the embeddings of 'random:llama'"):
        encoder.encode(TEXTS, "document")
    assert encoder.cosine < 0.98


def test_precisions_that_do_not_exist(monkeypatch):
    with pytest.raises(InputError, match="precision is 'int4'; expected float32"):
        Encoder(load_retriever("random:llama"), precision="int4")
    hooked = load_retriever("random:llama")
    hooked.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="int8 is for unmodified models"):
        Encoder(hooked, precision="int8")
    monkeypatch.setattr(packed, "build", lambda: Build(None, "no C++ compiler"))
    monkeypatch.setattr(encoder_module, "build", packed.build)
    with pytest.raises(InputError, match=r"bfloat16 is for .* is a llama on cpu, kernels no C\+\+ compiler"):
        Encoder(load_retriever("random:llama"), precision="bfloat16")


@needs_bfloat16
@pytest.mark.parametrize("family", RANDOM_MODELS)
def test_bfloat16_is_close_and_does_not_depend_on_the_batch(family):
    retriever = load_retriever(f"random:{family}")
    exact = Encoder(retriever).encode(TEXTS, "document")
    encoder = Encoder(retriever, precision="bfloat16")
    got = encoder.encode(TEXTS, "document")
    assert encoder.precision == "bfloat16" and np.abs(got - exact).max() > 1e-5
    assert (got * exact).sum(axis=1).min() > 0.999
    one_by_one = np.concatenate([encoder.encode([text], "document") for text in TEXTS])
    assert (got * one_by_one).sum(axis=1).min() > 0.99999


def test_a_family_that_nobody_described_has_its_own_pass(monkeypatch):
    monkeypatch.delitem(cpu_pass.PARTS, "gemma")
    encoder = Encoder(load_retriever("random:gemma2"))
    assert encoder.precision == "float32" and encoder._forward.padded


@needs_bfloat16
def test_models_that_are_compared_compute_alike(monkeypatch):
    monkeypatch.delenv(hardware.PINNED)
    monkeypatch.setattr(encoder_module, "detect", lambda: replace(hardware.detect(), precision="bfloat16"))
    monkeypatch.setattr(encoder_module, "_CHOSEN", 0.5)
    fast = Encoder(load_retriever("random:bert"))
    asked = Encoder(load_retriever("random:bert"), precision="int8")
    monkeypatch.setattr(encoder_module, "_CHOSEN", 1.1)
    slow = Encoder(load_retriever("random:llama"))
    assert [e.precision for e in comparable({"a": fast, "b": asked}).values()] == ["bfloat16", "int8"]
    together = comparable({"a": fast, "b": asked, "c": slow})
    assert [encoder.precision for encoder in together.values()] == ["float32", "int8", "float32"]


def test_without_kernels_nothing_is_lost_but_speed(monkeypatch):
    """A compiler that is there and compiles nothing."""
    monkeypatch.delenv(hardware.PINNED)
    monkeypatch.setattr(encoder_module, "detect", lambda: replace(hardware.detect(), precision="bfloat16"))
    monkeypatch.setattr(packed, "build", lambda: Build(None, "c++ does not compile them"))
    encoder = Encoder(load_retriever("random:bert"))
    assert encoder.precision == "float32" and not encoder._forward.padded
    monkeypatch.setenv(hardware.PINNED, "bfloat16")
    monkeypatch.setattr(encoder_module, "build", packed.build)
    with pytest.warns(RuntimeWarning, match=r"PRECISION is bfloat16, .* float32: kernels c\+\+ does not"):
        Encoder(load_retriever("random:bert"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_every_type_has_a_peak(precision, kernels):
    """Also where the processor has no such products of its own: something computes in it all the same."""
    assert 1e7 < gemm_peak("cpu", precision) < 1e14


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_half_precision_on_a_cpu(dtype):
    exact = Encoder(load_retriever("random:llama")).encode(TEXTS, "document")
    got = Encoder(load_retriever("random:llama", dtype=dtype)).encode(TEXTS, "document")
    assert (got * exact).sum(axis=1).min() > 0.999


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_nan_of_weights_comes_out_as_one(family, precision):
    retriever = load_retriever(f"random:{family}")
    with torch.no_grad():
        layer = retriever.family.layers(retriever.model)[1]
        retriever.family.up(retriever.family.mlp(layer)).weight[3, 5] = float("nan")
    try:
        encoder = Encoder(retriever, precision=precision)
    except InputError:
        pytest.skip("not on this processor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not np.isfinite(encoder.encode(TEXTS, "document")).any()


def test_a_text_longer_than_the_table_of_positions():
    """Kernels read what lies at an address: nothing may ask for what is not there."""
    encoder = Encoder(load_retriever("random:bert"))
    with pytest.raises(
        InputError, match="a text has 1000 tokens, and the model has positions for 512; expec"
    ):
        encoder.encode(["of the data " * 2000], "document", max_length=1000)
    assert np.isfinite(encoder.encode(["of the data " * 2000], "document", max_length=512)).all()


@needs_bfloat16
def test_bfloat16_is_chosen_where_it_changes_next_to_nothing(monkeypatch):
    monkeypatch.delenv(hardware.PINNED)
    monkeypatch.setattr(encoder_module, "detect", lambda: replace(hardware.detect(), precision="bfloat16"))
    monkeypatch.setattr(
        encoder_module, "_CHOSEN", 0.999
    )  # random weights are not as good-natured as trained ones
    chosen = Encoder(load_retriever("random:bert"))
    assert chosen.precision == "bfloat16" and 0.999 < chosen.cosine < 1
    monkeypatch.setattr(encoder_module, "_CHOSEN", 0.9999999)
    refused = Encoder(load_retriever("random:bert"))
    assert refused.precision == "float32" and refused.cosine is None
    np.testing.assert_allclose(refused.encode(TEXTS, "document"), alone(refused.retriever, TEXTS), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert"])
def test_packed_on_cuda_is_near_the_padded_pass(family):
    texts = TEXTS * 20
    retriever = load_retriever(f"random:{family}", dtype="bfloat16", device="cuda")
    encoder = Encoder(retriever)
    assert not encoder._forward.padded
    with torch.inference_mode():
        padded = PaddedForward(retriever)(retriever.tokenize(texts, "document")).float().cpu().numpy()
    got = encoder.encode(texts, "document")
    assert (got * padded).sum(axis=1).min() > 0.995
    single = encoder.encode(texts[:1], "query")
    assert float((single * encoder.encode(texts[:1] + texts[5:6], "query")[:1]).sum()) > 0.999


def test_windows_keep_the_input_order(monkeypatch):
    retriever = load_retriever("random:llama")
    whole = Encoder(retriever).encode(TEXTS, "document")
    monkeypatch.setattr(encoder_module, "WINDOW", 5)
    np.testing.assert_allclose(Encoder(retriever).encode(TEXTS, "document"), whole, atol=1e-5, rtol=0)


def test_no_texts():
    assert Encoder(load_retriever("random:bert")).encode([], "query").shape == (0, 64)


def test_out_of_memory_halves_the_budget_and_goes_on():
    retriever = load_retriever("random:llama")
    expected = Encoder(retriever).encode(TEXTS, "document")
    encoder = Encoder(retriever, token_budget=400)
    forward = encoder._forward

    class Small:
        padded = forward.padded

        def __call__(self, tokens):
            if sum(map(len, tokens)) > 90:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(tokens)

    encoder._forward = Small()
    np.testing.assert_allclose(encoder.encode(TEXTS, "document"), expected, atol=1e-5, rtol=0)
    assert encoder.token_budget <= 200


def test_one_text_that_does_not_fit_is_the_models_failure():
    encoder = Encoder(load_retriever("random:llama"))

    class Full:
        padded = True

        def __call__(self, tokens):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    encoder._forward = Full()
    with pytest.raises(TrialFailure, match="out of memory with a single text"):
        encoder.encode(["the study"], "query")


def test_bad_budget():
    with pytest.raises(InputError, match="token_budget"):
        Encoder(load_retriever("random:llama"), token_budget=0)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("model", "bfloat16", "int8"), [("minilm-l6", 0.9999, 0.998), ("smollm2-135m", 0.9998, 0.99)]
)
def test_real_weights_on_real_text(model, bfloat16, int8, monkeypatch):
    """Trained models have the channels that random ones lack."""
    retriever = load_retriever(model)
    texts = [str(module.__doc__) for module in (argparse, asyncio, csv, datetime, decimal, heapq, random, re)]
    exact = PaddedForward(retriever)
    with torch.inference_mode():
        want = torch.cat([exact([ids]) for ids in retriever.tokenize(texts, "document")]).numpy()
    got = Encoder(retriever).encode(texts, "document")
    np.testing.assert_allclose(got, want, atol=1e-5)
    kernels = build().kernels
    least = {"bfloat16": bfloat16, "int8": int8}
    for precision, there in (("bfloat16", kernels.has_bfloat16), ("int8", kernels.has_bytes)):
        if there:
            encoder = Encoder(retriever, precision=precision)
            cosines = (encoder.encode(texts, "document") * want).sum(axis=1)
            assert cosines.mean() > least[precision], precision
    monkeypatch.delenv(hardware.PINNED)
    assert Encoder(retriever).precision == hardware.detect().precision
