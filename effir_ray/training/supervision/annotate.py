"""Teacher scores for training pairs by a cross-encoder: what the paper's KL term needs (section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effir_ray.data.pair_stream import source_fingerprint
from effir_ray.data.pairs import Pair, load_pairs
from effir_ray.encoding.batching import token_budget_batches
from effir_ray.errors import InputError
from effir_ray.hardware import detect
from effir_ray.models.weights import quiet_transformers
from effir_ray.stages import StageStore, fingerprint
from effir_ray.training.supervision.resumable import Process, in_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def annotate(
    source: str | Path,
    *,
    by: str,
    stages: StageStore,
    max_length: int = 512,
    token_budget: int = 8192,
) -> Path:
    """Score every document of the pairs in ``source`` (files that ``load_pairs`` reads, all in memory)
    against its query; returns a JSONL file with ``teacher_scores``.

    ``by``: folder or hub id of any sequence classifier over (query, document) with one logit (BGE-reranker,
    the MS MARCO MiniLM cross-encoders, ...) or two (relevant minus not). Scores are logits; the loss takes
    their softmax. ``token_budget``: tokens a batch, padding included. A killed run resumes at the last
    finished chunk; a second run returns at once. Raises InputError for a model of another shape.
    """
    pairs = load_pairs(source)
    if not any(pair.negatives for pair in pairs):
        raise InputError(f"{source}: the pairs have no negatives to score; run effir-ray mine first")
    inputs = {"pairs": source_fingerprint(str(source)), "by": _model_key(by), "max_length": max_length}

    def make_process() -> Process:
        scorer = CrossEncoder(by, max_length=max_length, token_budget=token_budget)
        return lambda chunk: _annotated(chunk, scorer)

    return in_chunks(
        stages, "teacher-scores", inputs, pairs, make_process, description=f"Scoring by {by}", size=500
    )


class CrossEncoder:
    """A sequence classifier read as a relevance score."""

    def __init__(self, name: str, *, max_length: int, token_budget: int) -> None:
        self._model, self._tokenizer = _load(name)
        self._device = detect().device
        self._model.to(self._device)
        self._max_length, self._token_budget = max_length, token_budget

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One score a (query, document), in order."""
        if not pairs:
            return []
        encoded = self._tokenizer(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            truncation="longest_first",
            max_length=self._max_length,
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        scores = [0.0] * len(pairs)
        for batch in token_budget_batches(lengths, self._token_budget):
            rows = [{name: values[index] for name, values in encoded.items()} for index in batch]
            tensors = self._tokenizer.pad(rows, return_tensors="pt").to(self._device)
            logits = self._model(**tensors).logits.float()  # (batch, 1 or 2)
            relevance = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            for index, value in zip(batch, relevance.tolist(), strict=True):
                scores[index] = value
        return scores


def _annotated(pairs: Sequence[Pair], scorer: CrossEncoder) -> list[Pair]:
    documents = [pair.positives + pair.negatives for pair in pairs]
    scores = scorer.score(
        [(pair.query, text) for pair, texts in zip(pairs, documents, strict=True) for text in texts]
    )
    ends = list(accumulate(len(texts) for texts in documents))
    return [
        replace(pair, teacher_scores=tuple(scores[end - len(texts) : end]))
        for pair, texts, end in zip(pairs, documents, ends, strict=True)
    ]


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        with quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: cannot be loaded as a cross-encoder: {' '.join(str(error).split())}"
        ) from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(
            f"{name}: no weights for {missing}; expected a model trained as a cross-encoder (a reranker)"
        )
    if model.config.num_labels > 2:
        raise InputError(
            f"{name}: {model.config.num_labels} labels; expected 1 (relevance) or 2 (not relevant, relevant)"
        )
    if tokenizer.pad_token is None:  # decoder rerankers
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _model_key(name: str) -> str:
    """What the scores depend on: a folder's contents, or the hub id with the commit that is loaded."""
    if Path(name).is_dir():
        return fingerprint(Path(name))
    from transformers import AutoConfig

    try:
        commit = AutoConfig.from_pretrained(name, trust_remote_code=False)._commit_hash
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no such folder or model: {error}") from None
    return f"{name}@{commit}"
