"""Whatever the user does wrong ends in one clear line and exit code 2, never in a traceback."""

import errno
import json
import re
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from effir_ray.cli import app
from effir_ray.cli._app import stop
from effir_ray.errors import InputError, TrialFailure

Files = dict[str, str]

CORPUS = '{"_id": "d1", "title": "", "text": "red car"}\n{"_id": "d2", "title": "", "text": "blue tree"}\n'
QUERIES = '{"_id": "q1", "text": "car"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\n"
SPACE = "name: t\nbackbone: random:llama\ndataset: stdlib\n"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def one_line(result: Any) -> str:
    """The message, after checking that there is nothing else."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines: list[str] = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("effir-ray: ")
    return lines[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corpus.jsonl": None}, r"corpus\.jsonl"),
        ({"queries.jsonl": None}, r"queries\.jsonl"),
        ({"qrels/test.tsv": None}, "qrels"),
        ({"corpus.jsonl": CORPUS + '{"_id": "d3"\n'}, r"corpus\.jsonl:3"),
        ({"corpus.jsonl": CORPUS.replace("red car", "")}, r"corpus\.jsonl:1.*empty"),
        ({"qrels/test.tsv": QRELS + "q1\td2\tvery\n"}, r"test\.tsv:3"),
        ({"qrels/test.tsv": QRELS.replace("d1", "d9")}, r"test\.tsv.*corpus"),
    ],
)
def test_a_broken_data_set_is_named_by_file_and_line(
    tmp_path: Path, changed: dict[str, str | None], message: str
) -> None:
    files: dict[str, str | None] = {
        "corpus.jsonl": CORPUS,
        "queries.jsonl": QUERIES,
        "qrels/test.tsv": QRELS,
    }
    (tmp_path / "qrels").mkdir()
    for name, text in (files | changed).items():
        if text is not None:
            (tmp_path / name).write_text(text)
    assert re.search(message, one_line(run("evaluate", "--model", "random:bert", "--dataset", tmp_path)))


def test_a_model_with_missing_weights_is_refused_by_tensor(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    assert run("compress", "--backbone", "random:llama", "--drop-mlp", "1,", "--out", model).exit_code == 0
    weights = load_file(model / "model.safetensors")
    gone = next(name for name in weights if "o_proj" in name)
    del weights[gone]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = one_line(run("compress", "--backbone", model, "--drop-mlp", "2,", "--out", tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    assert gone.removeprefix("model.") in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SPACE + "schedulez: []\n", r"space\.yaml:4: unknown key 'schedulez'; did you mean 'schedules'\?"),
        (SPACE + "schedules: [{drop_mlp: 99}]\n", "99M.*drop_mlp is 99"),
        (SPACE + "schedules: [{drop_mlp: many}]\n", r"space\.yaml:4.*expected a count"),
        (SPACE + "schedules: [\n", "not valid YAML"),
        ("name: t\n", "backbone"),
    ],
)
def test_a_search_space_with_a_mistake_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(text)
    result = run("search", space, "--dry-run")
    assert result.exit_code == 2
    assert re.search(message, result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "--backbone", "random:llama", "--drop-mlp", "9", "--dry-run"), "only 4 of 4 layers"),
        (("compress", "--backbone", "random:llama", "--drop-mlp", "x", "--dry-run"), "expected a count"),
        (("compress", "--backbone", "random:llama", "--importance", "luck", "--dry-run"), "'cosine'"),
        (("compress", "--backbone", "random:llama"), "--out"),
        (("compress", "--backbone", "random:gpt", "--dry-run"), "random:llama"),
        (("search", "absent.yaml", "--dry-run"), "no such file"),
        (("search", "absent.yaml"), "--out"),
        (("pareto", "absent"), "no such folder"),
        (("pareto", "."), "no results here"),
        (("query", "SELECT 1"), "folders and a SELECT"),
        (("report", "absent"), "no such folder"),
        (("data", "get", "no-such-set"), "no-such-set"),
        (("evaluate", "--model", "random:bert", "--dataset", "absent"), "effir-ray data get"),
        (("analyze", "--backbone", "random:bert", "--criteria", "luck", "--out", "a"), "cosine, pooled"),
        (("train", "absent.yaml", "--model", "random:bert", "--out", "t"), "no such file"),
        (("evaluate", "--model", "random:bert", "--out", "s3://bucket/x"), "expected a path"),
        (("train", "absent.yaml", "--out", "s3://bucket/x"), "'storage_path: s3://bucket/x' in the settings"),
        (
            ("mine", "absent.jsonl", "--out", "s3://bucket/m.jsonl"),
            "--out s3://bucket/m.jsonl: expected a path",
        ),
        (("mine", "absent.jsonl", "--out", "m.jsonl"), "absent.jsonl"),
        (("annotate", "absent.jsonl", "--by", "x", "--out", "a.jsonl"), "absent.jsonl"),
        (("submit", "absent.yaml", "--out", "s"), "no such file"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_wrong_argument_is_explained(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in one_line(run(*arguments))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_or_option_suggests_the_nearest() -> None:
    for arguments, suggestion in ((["serch"], "search"), (["pareto", "x", "--pic", "knee"], "--pick")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert suggestion in result.stderr


def _raising(error: BaseException) -> Callable[[], None]:
    def diagnose() -> None:
        raise error

    return diagnose


class _FromWorker(InputError):
    """As Ray hands on a worker's exception: its text is the remote traceback, ``cause`` the original."""

    def __init__(self, cause: InputError) -> None:
        super().__init__(f"Traceback (most recent call last)\n{cause}")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("what was found; what was expected"), 2, "what was found"),
        (_FromWorker(InputError("from a worker")), 2, "effir-ray: from a worker\n"),
        (TrialFailure("the loss is NaN"), 1, "the loss is NaN"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "no disk space left (/data/x)"),
        (sqlite3.OperationalError("database or disk is full"), 2, "no disk space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 2, "/data/x: Permission denied"),
    ],
)
def test_errors_of_the_library_become_lines_and_codes(
    error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effir_ray.diagnose", _raising(error), raising=False)
    result = run("doctor")
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "error", [KeyError("bug"), OSError(errno.EACCES, "no file"), FileNotFoundError(2, "", "x")]
)
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effir_ray.diagnose", _raising(error), raising=False)
    with pytest.raises(type(error)):
        run("doctor")


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "space.yaml", "--out", "space.yaml"),
        ("search", "space.yaml", "--out", "space.yaml/below"),
        ("search", "space.yaml", "--out", "x" * 300),
        ("compress", "--backbone", "random:llama", "--drop-mlp", "1,", "--out", "space.yaml"),
    ],
    ids=["a file", "below a file", "a long name", "compress to a file"],
)
def test_a_place_that_cannot_be_written_is_named(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.setattr("effir_ray.search.study.connect", lambda address: None)
    assert str(arguments[-1]) in one_line(run(*arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effir_ray.diagnose", lambda: signal.raise_signal(signal.SIGINT), raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    result = run("doctor")
    signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr == "effir-ray: interrupted; what is finished is kept\n"


def test_sigterm_ends_with_143_and_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effir_ray.diagnose", lambda: signal.raise_signal(signal.SIGTERM), raising=False)
    monkeypatch.setattr("effir_ray.cli._app._stopped_by", [])
    before = signal.signal(signal.SIGTERM, stop)
    result = run("doctor")
    signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 143
    assert result.stderr == "effir-ray: interrupted; what is finished is kept\n"


def test_an_output_folder_of_another_study_is_left_alone(tmp_path: Path) -> None:
    from effir_ray.search.folder import STUDY_FILE

    space, out = tmp_path / "space.yaml", tmp_path / "out"
    space.write_text(SPACE)
    out.mkdir()
    space_of_other = {"name": "other", "backbone": "random:bert", "dataset": "stdlib"}
    other = {"space": space_of_other, "threads": 1, "contents": {}, "effir_ray": "0.1.0"}
    (out / STUDY_FILE).write_text(json.dumps(other))
    assert "other" in one_line(run("search", space, "--out", out, "--resume"))
    assert json.loads((out / STUDY_FILE).read_text()) == other
