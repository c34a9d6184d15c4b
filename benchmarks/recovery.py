"""How much of a model distillation brings back: MiniLM with some of its blocks, learnt from text alone.

    python benchmarks/recovery.py --data DATA --learn squad                         # zero-shot
    python benchmarks/recovery.py --data DATA --learn scifact nfcorpus cranfield    # what will be searched
    python benchmarks/recovery.py --data DATA --learn squad --recipe sentence-transformers

DATA holds BEIR folders. Learnt from are texts, never a judgement: of ``squad`` questions and paragraphs of
its train split, of other data sets documents, each beside its title or first sentence. Scored are all test
queries of ``--test`` over whole corpora; the full model, BM25 and the cut before it learns stand beside. One
row a score in OUT/rows; what is there already is not done again. One core: two hours a run.

--recipe effir: the blocks that ``pooled`` chooses on what is learnt from, 2 - 2 cos to the full model's
embeddings. sentence-transformers: evenly spaced blocks and its own trainer with its MSELoss, as its
model_distillation.py does, with as many steps of as many texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import known, measure_once

from effir_ray.compression.calibration import draw_examples
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.data.pairs import Pair, load_pairs, shuffled, write_pairs
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.evaluation.rows import make_row, score_columns
from effir_ray.hardware import detect
from effir_ray.models.folder import read_plan
from effir_ray.models.loading import load_config
from effir_ray.progress import show_progress
from effir_ray.results.store import append
from effir_ray.stages import StageStore, fingerprint
from effir_ray.training.config import DistillationConfig, TrainConfig
from effir_ray.training.run.launcher import train

BATCH, QUERY_LENGTH = 16, 32  # pairs a step, tokens
LENGTH = 256  # tokens of a document, in training as in evaluation: the limit of MiniLM


def main() -> None:
    options = arguments()
    tests = [load_dataset(str(options.data / name)) for name in options.test]
    with show_progress():
        for dataset in tests:
            bm25(options, dataset)
            score(options, dataset, options.model, "full", Schedule())
        texts = write_texts(options)
        cut, schedule = make_cut(options, texts)
        for dataset in tests:
            score(options, dataset, str(cut), "cut", schedule)
        for seed in range(options.seeds):
            place = (
                options.work
                / f"{options.recipe}-{'-'.join(options.learn)}-{options.keep}-{options.steps}-{seed}"
            )
            recipe = {
                "steps": options.steps,
                "batch": BATCH,
                "length": LENGTH,
                "learnt": options.learn,
                "texts": fingerprint(texts),
            }
            if options.recipe == "effir":
                config = settings(options, texts, seed)
                model = train(cut, config, place, stages=StageStore(options.work / "stages")).checkpoint
            else:
                model = sentence_transformers_recipe(options, cut, texts, seed, place)
            for dataset in tests:
                score(options, dataset, str(model), options.recipe, schedule, seed=seed, **recipe)
    report(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="minilm-l6", help="teacher, and what the student is cut from")
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--learn", nargs="+", default=["squad"], help="data sets whose texts are learnt from")
    parser.add_argument("--test", nargs="+", default=["scifact", "nfcorpus", "cranfield"])
    parser.add_argument("--keep", type=int, default=3, help="blocks that stay")
    parser.add_argument("--recipe", choices=("effir", "sentence-transformers"), default="effir")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--out", type=Path, default=Path("results/recovery"))
    return parser.parse_args()


def write_texts(options: argparse.Namespace) -> Path:
    """Everything that is learnt from, once."""
    file = options.work / f"{'-'.join(options.learn)}.jsonl"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".tmp")
        write_pairs(texts_of(options), aside)
        aside.rename(file)
    return file


def texts_of(options: argparse.Namespace) -> Iterator[Pair]:
    for name in options.learn:
        if name == "squad":
            pairs = shuffled(load_pairs(options.data / name), seed=0)
            yield from pairs[: options.steps * BATCH]
        else:
            yield from draw_examples(str(options.data / name), 10**7, 0)


def make_cut(options: argparse.Namespace, texts: Path) -> tuple[Path, Schedule]:
    blocks = load_config(options.model).num_hidden_layers
    gone = blocks - options.keep
    place = options.work / f"cut-{options.recipe}-{'-'.join(options.learn)}-{options.keep}"
    if options.recipe == "effir":
        schedule = Schedule(drop_block=gone, importance="pooled")
    else:
        step = blocks / options.keep  # its example keeps 1, 4, 7, 10 of 12
        spaced = {int(i * step + (step - 1) / 2) for i in range(options.keep)}
        schedule = Schedule(drop_block=tuple(sorted(set(range(blocks)) - spaced)))
    if not place.is_dir():
        calibration = Calibration(texts=64, texts_from=str(texts), max_length=128)
        compress(options.model, schedule, place, calibration=calibration)
    return place, schedule


def settings(options: argparse.Namespace, texts: Path, seed: int) -> TrainConfig:
    return TrainConfig(
        dataset=str(texts),
        info_nce=0.0,
        distillation=DistillationConfig(teacher=options.model, embedding=1.0),
        hard_negatives=0,
        steps=options.steps,
        batch_size=BATCH,
        learning_rate=2e-4,
        lora=None,
        zero_stage=0,
        cpus_per_worker=detect().threads,
        seed=seed,
        query_max_length=QUERY_LENGTH,
        document_max_length=LENGTH,
    )


def sentence_transformers_recipe(
    options: argparse.Namespace, cut: Path, texts: Path, seed: int, place: Path
) -> Path:
    """Its trainer, its MSELoss and the settings of its model_distillation.py (learning rate 1e-4, a tenth of
    warm-up), on the same texts, as many a step."""
    from datasets import Dataset as Table
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MSELoss

    if (place / "checkpoint").is_dir():
        return place / "checkpoint"
    pairs = load_pairs(texts, texts=True)[: options.steps * BATCH]
    sentences = [text for pair in pairs for text in (pair.query, pair.positives[0])]
    teacher, student = (SentenceTransformer(str(folder)) for folder in (packaged(options.model), cut))
    teacher.max_seq_length = student.max_seq_length = LENGTH
    labels = teacher.encode(sentences, batch_size=64, show_progress_bar=True)
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(place / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=2 * BATCH,
            learning_rate=1e-4,
            warmup_ratio=0.1,
            seed=seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Table.from_dict({"sentence": sentences, "label": labels.tolist()}),
        loss=MSELoss(student),
    )
    trainer.train()
    student.save_pretrained(str(place / "checkpoint"))
    return place / "checkpoint"


def packaged(name: str) -> Path:
    from effir_ray.models.names import resolve

    path = resolve(name).path
    assert path is not None
    return path


def bm25(options: argparse.Namespace, dataset: Dataset) -> None:
    if any(row["backbone"] == "bm25" and row["dataset"] == dataset.name for row in known(options.out)):
        return
    result = evaluate("bm25", dataset)
    row = make_row(
        study="recovery",
        trial_id=f"bm25-{dataset.name}",
        trial=json.dumps({"method": "bm25", "dataset": dataset.fingerprint}),
        schedule="full",
        backbone="bm25",
        dataset=dataset.name,
        split="test",
        seed=0,
        **score_columns(result.scores),
    )
    append(options.out, [row])


def score(
    options: argparse.Namespace,
    dataset: Dataset,
    model: str,
    method: str,
    schedule: Schedule,
    *,
    seed: int = 0,
    **recipe: Any,
) -> None:
    plan = read_plan(Path(model), load_config(model)) if Path(model).is_dir() else None
    described = {
        "benchmark": "recovery",
        "method": method,
        "backbone": options.model,
        "schedule": schedule.model_dump(mode="json"),
        "plan": plan and plan.model_dump(mode="json"),
        "data": dataset.fingerprint,
        "seed": seed,
        "document_length": 256,
        **recipe,
    }
    measure_once(
        options.out,
        described,
        lambda: evaluate(model, dataset),
        backbone=options.model,
        dataset=dataset,
        split="test",
        schedule=schedule,
        plan=plan,
        seed=seed,
        recovered=bool(recipe),
    )


def report(options: argparse.Namespace) -> None:
    """nDCG@10 of each method on every data set, mean over seeds, and their mean beside the full one."""
    scores: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in known(options.out):
        trial = json.loads(row["trial"])
        kept = sum(layer["attention"] for layer in (trial.get("plan") or {"layers": []})["layers"])
        method = (trial["method"], "+".join(trial.get("learnt", ())), kept, trial.get("steps", 0))
        scores.setdefault(method, {}).setdefault(row["dataset"], []).append(row["ndcg_at_10"])
    full = scores[("full", "", 0, 0)]
    names = " ".join(f"{name:>10}" for name in full)
    print(f"{'method':22} {'learnt from':26} {'blocks':6} {'steps':5} {names}  of full")
    for method, found in sorted(scores.items(), key=lambda item: (item[0][2], item[0])):
        cells = [statistics.mean(found[name]) if name in found else float("nan") for name in full]
        whole = [statistics.mean(full[name]) for name in full]
        print(
            f"{method[0]:22} {method[1]:26} {method[2] or '':6} {method[3] or '':5} "
            f"{' '.join(f'{cell:10.4f}' for cell in cells)}  {sum(cells) / sum(whole):.1%}"
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"recovery: {error}")
