"""Packed training passes against the model's own padded forward: embeddings and gradients."""

from __future__ import annotations

import pytest
import torch

from effir_ray.compression.surgery import apply_plan
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.training.step.text_encoder import TextEncoder, without_dropout

LENGTHS = [9, 4, 4, 4, 1, 12]
PACKED = ("llama", "mistral", "qwen2", "qwen3", "bert")
FEW_LAYERS = Plan(
    layers=tuple(LayerPlan(attention=n != 1, mlp=n != 2) for n in range(4)),
)


def random_ids(retriever: Retriever) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    size = retriever.model.config.vocab_size
    return [torch.randint(5, size, (length,), generator=draw) for length in LENGTHS]


def padded(retriever: Retriever, texts: list[torch.Tensor]) -> torch.Tensor:
    ids = torch.zeros(len(texts), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    hidden = retriever.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return retriever.pool(hidden, mask)


def gradients(retriever: Retriever, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)
    retriever.model.zero_grad()
    (embeddings * weights).sum().backward()
    return {n: p.grad.clone() for n, p in retriever.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("family", [*PACKED, "gemma2", "modernbert"])
def test_embeddings_and_gradients_are_those_of_the_padded_pass(family: str, pooling: str) -> None:
    retriever = load_retriever(f"random:{family}")
    if pooling == "last":
        retriever = apply_plan(retriever, FEW_LAYERS)
    retriever.spec = retriever.spec.model_copy(update={"pooling": pooling})
    texts = random_ids(retriever)
    expected = padded(retriever, texts)
    wanted = gradients(retriever, expected)
    encoder = TextEncoder(retriever)
    assert encoder.padded is (family not in PACKED)
    found = encoder(torch.cat(texts), torch.tensor(LENGTHS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    got = gradients(retriever, found)
    assert set(got) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=1e-4)
    # The model itself still takes padded batches.
    torch.testing.assert_close(padded(retriever, texts), expected, atol=1e-6, rtol=0)


def test_texts_longer_than_a_window_are_padded() -> None:
    retriever = load_retriever("random:mistral")
    retriever.model.config.sliding_window = 8
    texts = random_ids(retriever)
    expected = padded(retriever, texts)
    found = TextEncoder(retriever)(torch.cat(texts), torch.tensor(LENGTHS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_attention_dropout_is_drawn() -> None:
    retriever = load_retriever("random:bert")
    encoder = TextEncoder(retriever)
    ids, lengths = torch.cat(random_ids(retriever)), torch.tensor(LENGTHS)
    plain = encoder(ids, lengths)
    retriever.model.train()
    for module in retriever.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(encoder(ids, lengths), plain)
    for layer in retriever.model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    assert (encoder(ids, lengths) - plain).abs().max() > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", PACKED)
def test_gradients_on_cuda_are_near_those_of_the_padded_pass(family: str) -> None:
    retriever = load_retriever(f"random:{family}")
    texts = random_ids(retriever)
    wanted = gradients(retriever, padded(retriever, texts))
    retriever.model.to("cuda", torch.bfloat16)
    found = TextEncoder(retriever)(torch.cat(texts).cuda(), torch.tensor(LENGTHS))
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in gradients(retriever, found).items():
        if wanted[name].norm() < 1e-3 * largest:
            continue  # zero but for rounding, as the bias of BERT's keys is
        flat = torch.stack([gradient.float().cpu().flatten(), wanted[name].flatten()])
        assert torch.cosine_similarity(flat[0], flat[1], dim=0) > 0.98, name


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama", "gemma3"])
def test_every_dropout_can_be_left_out_in_training_mode(kind: str) -> None:
    def passes(*, dropout: bool) -> tuple[torch.Tensor, torch.Tensor]:
        retriever = load_retriever(f"random:{kind}")
        for module in retriever.model.modules():  # random models are made without
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.3
        retriever.model.train()
        if not dropout:
            without_dropout(retriever.model)
        encoder = TextEncoder(retriever)
        ids, lengths = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([5])
        return encoder(ids, lengths), encoder(ids, lengths)

    assert not torch.equal(*passes(dropout=True))
    assert torch.equal(*passes(dropout=False))
