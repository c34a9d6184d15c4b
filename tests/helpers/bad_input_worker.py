"""Gives every bad input to the part of effir-ray that reads it.

Started by ``test_bad_inputs.py``: ``python bad_input_worker.py SCRATCH KIND...``, all in one process, because
a start takes longer than most readers. Prints one JSON line a file: {"kind", "file", "code", "lines",
"seconds", "gib", "error"}; ``code`` is the exit code of a command.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.helpers import bad_files

CORPUS = Path(__file__).parents[1] / "bad_inputs"
SECONDS = 10
# sentence-transformers' files, which are not looked at where ours is.
_AFTER_OURS = (
    "1_Pooling/config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_ADDRESS_SPACE = 8 * 2**30  # bytes; resident memory is what counts, this one only saves the machine

_LARGE = 2**20  # bytes

Try = Callable[[Path], Any]


def command(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from effir_ray.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class _Result:
    """What a library call would be as a command."""

    def __init__(self, call: Callable[[], object]) -> None:
        from effir_ray.errors import InputError

        self.exit_code, self.stderr, self.stdout = 0, "", ""
        self.exception: BaseException | None = None
        try:
            call()
        except InputError as error:
            self.exit_code, self.stderr = 2, f"effir-ray: {error}\n"
        except Exception as error:
            self.exit_code, self.exception = 1, error


def _place(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.is_file() and source.stat().st_size < _LARGE:
        shutil.copyfile(source, target)
    else:  # pipes, devices, and files of gigabytes that take no room
        target.symlink_to(source)
    return target


def _model(scratch: Path, *, shorter: bool = False) -> Path:
    """A small real model, of shorter embeddings if asked for; built once."""
    base = scratch / ("shorter" if shorter else "base")
    if not base.exists():
        import numpy as np

        from effir_ray.compression.dimension import shorten
        from effir_ray.models.checkpoint import save_checkpoint
        from effir_ray.models.retriever import load_retriever

        model = load_retriever("random:llama")
        save_checkpoint(shorten(model, np.eye(64, dtype=np.float32), 16) if shorter else model, base)
    return base


def _load(folder: Path) -> Any:
    from effir_ray.models.retriever import load_retriever

    return _Result(lambda: load_retriever(folder))


def in_model(scratch: Path, name: str) -> Try:
    """Put the file under ``name`` into a copy of a model, and load that."""

    def attempt(file: Path) -> Any:
        folder = scratch / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(_model(scratch, shorter=name.startswith("2_Dense")), folder)
        if name in _AFTER_OURS:
            (folder / "effir.json").unlink()
        _place(file, folder / name)
        return _load(folder)

    return attempt


def as_adapter(scratch: Path) -> Try:
    def attempt(file: Path) -> Any:
        import torch
        from safetensors.torch import save_file

        _model(scratch)
        folder = scratch / "adapter"
        _place(file, folder / "adapter_config.json")
        name = "base_model.model.layers.0.self_attn.q_proj.lora_"
        pair = {f"{name}A.weight": torch.zeros(2, 64), f"{name}B.weight": torch.zeros(64, 2)}
        save_file(pair, folder / "adapter_model.safetensors")
        return _load(folder)

    return attempt


def in_dataset(scratch: Path, name: str) -> Try:
    """Put the file under ``name`` into a small BEIR folder, and measure a model on that."""

    def attempt(file: Path) -> Any:
        folder = scratch / "data"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "qrels").mkdir(parents=True)
        (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "red car"}\n')
        (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "car"}\n')
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
        if name.startswith("corpus.parquet"):
            (folder / "corpus.jsonl").unlink()
        _place(file, folder / name)
        return command("evaluate", "--model", "random:bert", "--dataset", folder)

    return attempt


def study(scratch: Path) -> Try:
    def attempt(file: Path) -> Any:
        out = scratch / "study"
        _place(file, out / "study.json")
        space = scratch / "space.yaml"
        space.write_text("name: t\nbackbone: random:llama\ndataset: stdlib\n")
        return command("search", space, "--out", out, "--resume")

    return attempt


def rows(scratch: Path, name: str = "a.parquet") -> Try:
    def attempt(file: Path) -> Any:
        out = scratch / f"rows-{name}"
        _place(file, out / "rows" / name)
        return command("pareto", out)

    return attempt


def sql(scratch: Path) -> Try:
    def attempt(file: Path) -> Any:
        from effir_ray.results import query as queries

        queries._SECONDS = 1.0  # what never ends need not be waited for longer
        statement = file.read_text()
        return _Result(lambda: queries.query([_results(scratch)], statement))

    return attempt


def _results(scratch: Path) -> Path:
    folder = scratch / "results"
    if not folder.exists():
        from effir_ray.results import store
        from effir_ray.results.schema import TrialRow

        row = {"study": "s", "trial_id": "a", "trial": "{}", "schedule": "full", "backbone": "b", "seed": 0}
        store.append(folder, [TrialRow(**row, dataset="d", split="dev", ndcg_at_10=0.5)])
    return folder


def archive(scratch: Path) -> Try:
    def attempt(file: Path) -> Any:
        from effir_ray.data.download import _unpack

        return _Result(lambda: _unpack(file, scratch / "scifact"))

    return attempt


def pairs(scratch: Path) -> Try:
    def attempt(file: Path) -> Any:
        return command("mine", file, "--out", scratch / "mined.jsonl")

    return attempt


def pair_folder(scratch: Path) -> Try:
    def attempt(file: Path) -> Any:
        folder = scratch / f"pairs-{file.suffix[1:]}"
        _place(file, folder / f"a{file.suffix}")
        return command("annotate", folder, "--by", "random:bert", "--out", scratch / "annotated.jsonl")

    return attempt


def stage(scratch: Path, name: str) -> Try:
    """Put the file under ``name`` into a stage of a study, and look at all stages as a resume does."""

    def attempt(file: Path) -> Any:
        from effir_ray.stages import StageStore

        store = StageStore(scratch / f"stages-{name}")
        _place(file, store.root / "recovered" / "0123456789abcdef" / name)
        return _Result(lambda: (list(store.finished("recovered")), store.freed_bytes()))

    return attempt


def training(scratch: Path) -> Try:
    def attempt(file: Path) -> Any:
        out = scratch / "begun"
        _place(file, out / "training.json")
        pair, settings = scratch / "one-pair.jsonl", scratch / "training.yaml"
        pair.write_text('{"query": "a car", "positive": "red car"}\n')
        settings.write_text(f"dataset: {pair}\nbatch_size: 2\n")
        return command("train", settings, "--model", "random:bert", "--out", out)

    return attempt


def progress(file: Path) -> Any:
    from effir_ray.training.run.fault_tolerance import read_progress

    return _Result(lambda: read_progress(file))


def history(file: Path) -> Any:
    from effir_ray.training.run.history import read_history

    return _Result(lambda: read_history(file))


def kinds(scratch: Path) -> dict[str, tuple[str, Try]]:
    """Name -> (folder of the corpus, or the list of ``bad_files`` and a suffix; what to do with a file)."""
    return {
        "spaces": ("spaces", lambda file: command("search", file, "--dry-run")),
        "trainings": (
            "trainings",
            lambda file: command("train", file, "--model", "random:bert", "--out", scratch / "trained"),
        ),
        "config": ("model/config", in_model(scratch, "config.json")),
        "effir": ("model/effir", in_model(scratch, "effir.json")),
        "pooling": ("model/pooling", in_model(scratch, "1_Pooling/config.json")),
        "modules": ("model/modules", in_model(scratch, "modules.json")),
        "dense": ("model/dense", in_model(scratch, "2_Dense/config.json")),
        "dense-weights": ("SAFETENSORS .safetensors", in_model(scratch, "2_Dense/model.safetensors")),
        "lengths": ("model/lengths", in_model(scratch, "sentence_bert_config.json")),
        "prompts": ("model/prompts", in_model(scratch, "config_sentence_transformers.json")),
        "tokenizer": ("model/tokenizer", in_model(scratch, "tokenizer.json")),
        "index": ("model/index", in_model(scratch, "model.safetensors.index.json")),
        "adapter": ("adapter", as_adapter(scratch)),
        "safetensors": ("SAFETENSORS .safetensors", in_model(scratch, "model.safetensors")),
        "gguf": ("GGUF .gguf", _load),
        "pairs": ("pairs", pairs(scratch)),
        "pair-tables": ("PAIR_TABLES .parquet", pairs(scratch)),
        "pair-lines": ("PAIR_LINES .jsonl", pairs(scratch)),
        "pair-folders": ("PAIR_LINES .jsonl", pair_folder(scratch)),
        "corpus": ("corpus", in_dataset(scratch, "corpus.jsonl")),
        "corpus-tables": ("CORPUS_TABLES .parquet", in_dataset(scratch, "corpus.parquet")),
        "corpus-parts": ("CORPUS_TABLES .parquet", in_dataset(scratch, "corpus.parquet/a.parquet")),
        "qrels": ("qrels", in_dataset(scratch, "qrels/test.tsv")),
        "rows": ("ROWS .parquet", rows(scratch)),
        "sql": ("sql", sql(scratch)),
        "study": ("study", study(scratch)),
        "stage-records": ("own/stage", stage(scratch, "stage.json")),
        "freed": ("own/freed", stage(scratch, "freed.json")),
        "begun-trainings": ("own/training", training(scratch)),
        "progress": ("own/progress", progress),
        "history": ("own/history", history),
        "archives": ("ARCHIVES .zip", archive(scratch)),
    }


def files(source: str, scratch: Path) -> Iterator[Path]:
    if not source.isupper() and " " not in source:
        yield from sorted(path for path in (CORPUS / source).iterdir() if path.is_file())
        return
    name, suffix = source.split()
    folder = scratch / name
    folder.mkdir(exist_ok=True)
    for case, write in getattr(bad_files, name).items():
        write(folder / f"{case}{suffix}")
        yield folder / f"{case}{suffix}"


def pipes(scratch: Path) -> Iterator[tuple[Path, Try]]:
    """A pipe that nobody writes to, and a device without an end, in place of every file that a user names."""
    every = kinds(scratch)
    suffixes = {"pairs": ".jsonl", "gguf": ".gguf", "pair-tables": ".parquet"}
    for kind in ("spaces", "trainings", "pairs", "corpus", "qrels", "gguf", *_TABLES):
        file = scratch / f"pipe-{kind}{suffixes.get(kind, '')}"
        bad_files.pipe(file)
        endless = scratch / f"endless-{kind}{suffixes.get(kind, '')}"
        endless.symlink_to("/dev/zero")
        yield from ((each, every[kind][1]) for each in (file, endless))
    yield file, rows(scratch, "a.compact.parquet")


_TABLES = ("pair-tables", "corpus-tables", "corpus-parts", "rows")


def main() -> None:
    scratch, chosen = Path(sys.argv[1]), sys.argv[2:]
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    signal.signal(signal.SIGALRM, _late)
    for kind in chosen:
        if kind == "pipes":
            cases = list(pipes(scratch))
        else:
            source, attempt = kinds(scratch)[kind]
            cases = [(file, attempt) for file in files(source, scratch)]
        with contextlib.suppress(Exception):
            cases[0][1](cases[0][0])  # imports are not the file's fault
        for file, attempt in cases:
            print(json.dumps({"kind": kind, **_outcome(file, attempt)}), flush=True)


def _outcome(file: Path, attempt: Try) -> dict[str, Any]:
    began = time.monotonic()
    signal.alarm(SECONDS)
    try:
        result = attempt(file)
        error = result.exception
        found: dict[str, Any] = {"code": result.exit_code, "lines": result.stderr.splitlines()}
        found["error"] = "" if error is None or isinstance(error, SystemExit) else _trace(error)
    except BaseException as error:
        found = {"code": 1, "lines": [], "error": _trace(error)}
    signal.alarm(0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"file": file.name, **found, "seconds": time.monotonic() - began, "gib": memory}


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-1500:]


def _late(number: int, frame: Any) -> None:
    raise TimeoutError(f"still at work after {SECONDS} s")


if __name__ == "__main__":
    main()
