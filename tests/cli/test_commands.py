"""What every command promises: help with examples, JSON on request, fast start."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from effir_ray import doctor
from effir_ray.cli import app
from effir_ray.cli._output import show_as
from effir_ray.demo import Demo
from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.results.query import query
from effir_ray.results.schema import TrialRow
from effir_ray.results.selection import pareto
from effir_ray.training.config import TrainConfig
from effir_ray.training.run.launcher import TrainResult
from tests.helpers.beir_folders import write_folder

COMMANDS = [
    (name,) if not hasattr(command, "commands") else (name, inner)
    for name, command in get_command(app).commands.items()
    for inner in getattr(command, "commands", [None])
]
NO_REPORT = {("logs",)}  # it shows what a job wrote, as it is


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three schedules on dev, the smallest of them also on test."""
    base = {"study": "s", "trial": "{}", "backbone": "random:llama", "dataset": "stdlib"}
    figures = [("full", 0.5, 1000), ("2M", 0.4, 700), ("4M", 0.1, 900)]
    rows = [
        TrialRow(**base, trial_id=name, schedule=name, split="dev", ndcg_at_10=score, parameters=size)
        for name, score, size in figures
    ]
    rows.append(rows[1].model_copy(update={"split": "test", "ndcg_at_10": 0.35}))
    store.append(tmp_path / "study", rows)
    return tmp_path / "study"


def test_help_is_wrapped_by_the_terminal_and_not_by_our_lines() -> None:
    for name, command in get_command(app).commands.items():
        for inner in getattr(command, "commands", {name: command}).values():
            paragraphs = inner.help.split("\n\n")
            assert not [part for part in paragraphs if "\n" in part and not part.startswith("\b")], name
            assert paragraphs[-1].startswith("\b\n[bold]Examples[/bold]\n"), name


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_how_to_use_the_command(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"effir-ray {' '.join(command)}" in result.stdout.partition("Examples")[2]
    assert ("--json" in result.stdout) == (command not in NO_REPORT)


def test_start_up_imports_nothing_heavy() -> None:
    heavy = [
        "torch",
        "transformers",
        "ray",
        "deepspeed",
        "faiss",
        "beir",
        "optuna",
        "duckdb",
        "pyarrow",
        "numpy",
    ]
    code = f"import sys, effir_ray.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_front_as_json_has_the_rows_and_their_test_scores(study: Path) -> None:
    rows = json.loads(run("pareto", study, "--json").stdout)
    found = [(row["schedule"], row["ndcg_at_10"], row["test_ndcg_at_10"]) for row in rows]
    assert found == [("full", 0.5, None), ("2M", 0.4, 0.35)]


def test_a_front_as_a_table_has_a_line_a_model(study: Path) -> None:
    text = run("pareto", study).stdout
    assert "random:llama on stdlib, dev queries" in text
    assert [line.split("│")[2].strip() for line in text.splitlines() if line.startswith("│")] == [
        "full",
        "2M",
    ]


def test_pick_and_where_narrow_the_front(study: Path) -> None:
    assert (
        json.loads(run("pareto", study, "--pick", "ndcg_at_10>=0.3", "--json").stdout)[0]["schedule"] == "2M"
    )
    narrowed = run("pareto", study, "--where", "ndcg_at_10 > 0.4", "--json").stdout
    assert [row["schedule"] for row in json.loads(narrowed)] == ["full"]


def test_a_query_prints_a_table_or_json(study: Path) -> None:
    sql = "SELECT schedule, parameters FROM trials WHERE split = 'test'"
    assert json.loads(run("query", study, sql, "--json").stdout) == [{"schedule": "2M", "parameters": 700}]
    assert "700" in run("query", study, sql).stdout


def test_a_query_writes_what_other_programs_read(study: Path) -> None:
    """Whole: a table for people has four digits."""
    sql = "SELECT schedule, ndcg_at_10 / 3 AS third, [1, 2] AS list FROM trials WHERE schedule = '2M'"
    expected = query(study, sql)

    def written(form: str) -> bytes:
        return run("query", study, sql, "--format", form).stdout_bytes

    assert pq.read_table(pa.BufferReader(written("parquet"))) == expected
    assert pa.ipc.open_file(written("arrow")).read_all() == expected
    assert json.loads(written("json")) == expected.to_pylist()
    rows = list(csv.DictReader(io.StringIO(written("csv").decode())))
    assert [(row["schedule"], float(row["third"]), json.loads(row["list"])) for row in rows] == [
        (row["schedule"], row["third"], row["list"]) for row in expected.to_pylist()
    ]
    assert written("md").decode().splitlines()[:2] == ["| schedule | third | list |", "| --- | --- | --- |"]


def test_a_cell_of_markdown_stays_in_its_column(study: Path) -> None:
    sql = "SELECT 'a|b' || chr(10) || 'c' AS text"
    assert run("query", study, sql, "--format", "md").stdout.splitlines()[-1] == "| a\\|b c |"


def test_a_terminal_gets_no_binary_table(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--format parquet: not for a terminal"), monkeypatch.context() as at:
        at.setattr(sys.stdout, "isatty", lambda: True)
        show_as(query(study, "SELECT 1"), "parquet")


def test_the_schema_of_a_query_names_what_a_query_can_ask(study: Path) -> None:
    listed = json.loads(run("query", "--schema", "--json").stdout)
    for table in ("trials", "query_scores", "published"):
        columns = query(study, f"SELECT * FROM {table} LIMIT 0").schema.names
        assert [row["column"] for row in listed if row["table"] == table] == columns
    assert all(row["description"] for row in listed), "a column that says nothing of itself"


def test_damaged_tables_are_named_and_left_out_when_told_to(study: Path) -> None:
    (study / "rows" / "00-damaged.parquet").write_bytes(b"PAR1 and no more")
    for command in (["pareto", study], ["query", study, "SELECT 1"], ["report", study]):
        refused = run(*command)
        assert refused.exit_code == 2 and "00-damaged.parquet" in refused.stderr
        done = run(*command, "--skip-damaged")
        assert done.exit_code == 0 and "left out: " in done.stderr and "00-damaged.parquet" in done.stderr
    told = run("compare", study, "--skip-damaged").stderr
    assert "left out: " in told and "scores of single queries" in told  # these rows have none


def test_a_report_is_written_beside_the_study_unless_told_otherwise(study: Path, tmp_path: Path) -> None:
    written = json.loads(run("report", study, "--json").stdout)["file"]
    assert Path(written) == study / "report.html"
    (rows,) = (study / "rows").glob("*.parquet")
    assert Path(json.loads(run("report", rows, "--json").stdout)["file"]) == rows.with_name("report.html")
    assert run("report", study, "--out", tmp_path / "front.svg").exit_code == 0
    assert (tmp_path / "front.svg").read_text().lstrip().startswith("<?xml")


def test_compress_says_how_long_embeddings_are() -> None:
    said = run("compress", "--backbone", "random:bert", "--dimension", 16, "--dry-run").stdout
    assert "random:bert: d16" in said and "embeddings of 16" in " ".join(said.split())
    refused = run("compress", "--backbone", "random:bert", "--dimension", 64, "--dry-run")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        "effir-ray: dimension is 64; the backbone's embeddings have 64: expected fewer, or 0 for all of them"
    ]


def test_compress_takes_the_width_of_every_layer() -> None:
    asked = ("compress", "--backbone", "random:llama", "--dry-run", "--layer-widths")
    said = run(*asked, "128,64,8,32").stdout
    assert "random:llama: w[128,64,8,32]" in said and "8 neurons" in said
    for widths, message in (
        ("128,64", "layer_widths has 2 widths; the backbone has 4 layers"),
        (
            "128,64,x,1",
            "options of compress: layer_widths: expected the neurons that each layer keeps, such as",
        ),
    ):
        refused = run(*asked, widths)
        assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1
        assert refused.stderr.startswith(f"effir-ray: {message}")


def test_compress_previews_and_then_writes_the_same_plan(tmp_path: Path) -> None:
    options = ("--backbone", "random:llama", "--drop-mlp", "1,2", "--drop-last-blocks", 1, "--json")
    preview = json.loads(run("compress", *options, "--dry-run").stdout)
    assert preview["checkpoint"] is None
    written = json.loads(run("compress", *options, "--out", tmp_path / "small").stdout)
    reason = "layer 1 has attention and no MLP (and 1 more like it)"
    layout = {"ordinary": False, "reason": reason}
    assert written == preview | {"checkpoint": str(tmp_path / "small"), "layout": layout}
    assert [layer["mlp"] for layer in written["plan"]["layers"]] == [True, False, False, False]
    assert (tmp_path / "small" / "config.json").is_file()


def test_a_dry_run_of_a_search_lists_every_schedule(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("name: t\nbackbone: random:llama\ndataset: stdlib\nschedules: [{drop_mlp: 2}]\n")
    preview = json.loads(run("search", space, "--dry-run", "--json").stdout)
    assert [trial["schedule"] for trial in preview["trials"]] == ["full", "2M"]
    assert "2M" in run("search", space, "--dry-run").stdout


def test_train_takes_its_model_from_the_settings_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def train(model: str, config: TrainConfig, out: Path, **options: object) -> TrainResult:
        asked.append(model)
        return TrainResult(checkpoint=out / "checkpoint", step=1, history=[], seconds=1.0, engine="none")

    monkeypatch.setattr("effir_ray.train", train, raising=False)
    settings, out = tmp_path / "train.yaml", tmp_path / "out"
    settings.write_text("dataset: stdlib\n")
    nothing = run("train", settings, "--out", out)
    assert nothing.exit_code == 2
    assert "add 'model: NAME'" in nothing.stderr
    settings.write_text("model: random:llama\ndataset: stdlib\n")
    assert run("train", settings, "--out", out).exit_code == 0
    assert run("train", settings, "--out", out, "--model", "random:bert").exit_code == 0
    assert asked == ["random:llama", "random:bert"]


def test_the_demonstration_as_json_is_its_front_and_report(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Demo(front=pareto([study]), report=study / "report.html")
    monkeypatch.setattr("effir_ray.run_demo", lambda out, address: done, raising=False)
    shown = json.loads(run("demo", "--out", study, "--json").stdout)
    assert [row["schedule"] for row in shown["front"]] == ["full", "2M"]
    assert shown["report"] == str(study / "report.html")


def test_doctor_gives_a_reason_for_everything_it_found() -> None:
    findings = json.loads(run("doctor", "--json").stdout)
    subjects = {finding["subject"] for finding in findings}
    assert {"device", "precision", "threads", "exact search", "training engine", "Ray"} <= subjects
    if "compiled kernels" in subjects:  # a CPU
        (products,) = (f["found"] for f in findings if f["subject"] == "matrix products")
        assert products.startswith("float32 ") and products.endswith(" GFLOP/s")
    assert all(finding["found"] and finding["reason"] for finding in findings)


@pytest.mark.parametrize(
    ("environment", "left", "found", "ok"),
    [
        ({}, False, "none", True),
        ({}, True, "/.ray/auth_token", False),
        ({"RAY_AUTH_MODE": "token"}, False, "none", False),
        ({"RAY_AUTH_MODE": "token"}, True, "/.ray/auth_token", True),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "planted"}, True, "RAY_AUTH_TOKEN", True),
        ({"RAY_AUTH_MODE": "disabled"}, True, "/.ray/auth_token", True),
        ({"RAY_AUTH_TOKEN": "planted"}, False, "RAY_AUTH_TOKEN", True),
    ],
)
def test_doctor_says_where_rays_token_is_and_warns_of_one_that_was_left(
    environment: dict[str, str],
    left: bool,
    found: str,
    ok: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    if left:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("planted")
    finding = doctor._token()
    assert finding.found.endswith(found)
    assert finding.ok is ok
    assert ("InvalidAuthToken" in finding.reason) is (not ok and left)
    assert "planted" not in f"{finding}"


def test_data_sets_are_listed_with_their_sizes() -> None:
    listed = {item["name"]: item for item in json.loads(run("data", "list", "--json").stdout)}
    assert listed["scifact"]["documents"] == 5183
    assert "stdlib" in listed


@pytest.mark.filterwarnings("ignore:int8 changes")
def test_precision_is_chosen_and_told(tmp_path: Path) -> None:
    write_data(tmp_path)
    options = ("--model", "random:bert", "--dataset", tmp_path)
    asked = json.loads(run("evaluate", *options, "--precision", "int8", "--json").stdout)
    assert asked["precision"] == "int8"
    assert json.loads(run("evaluate", *options, "--json").stdout)["precision"] == "float32"
    assert "encoded in float32, searched in" in run("evaluate", *options).stdout
    refused = run("evaluate", *options, "--precision", "int4")
    assert refused.exit_code == 2 and "int4" in refused.output
    run("encode", *options, "--out", tmp_path / "vectors", "--precision", "int8")
    (shard,) = (tmp_path / "vectors" / "shards").glob("*.json")
    assert json.loads(shard.read_text())["computed_in"] == "int8"


def test_measured_models_stand_side_by_side(tmp_path: Path) -> None:
    write_data(tmp_path)
    options = ("--dataset", tmp_path, "--queries", 1, "--documents", 3, "--rounds", 1)
    found = json.loads(run("measure", "--model", "random:llama", *options, "--json").stdout)
    assert found["random:llama"]["document_speedup"] == 1 and found["random:llama"]["query_ms_p50"] > 0
    assert found["random:llama"]["precision"] == "float32"
    table = run("measure", "--model", "random:llama", "--model", "random:bert", *options).stdout
    assert "random:bert" in table and "1.00x (1.00 to 1.00)" in table


def write_data(folder: Path) -> None:
    lines = [json.dumps({"_id": str(i), "text": f"text {i}"}) for i in range(3)]
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "queries.jsonl").write_text(lines[0], encoding="utf-8")
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t1\t1\n", encoding="utf-8")


def test_a_sample_is_evaluated_and_needs_both_numbers(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "toy")
    command = ["evaluate", "--model", "bm25", "--dataset", data, "--json"]
    found = json.loads(run(*command, "--queries", "3", "--documents", "12").stdout)
    assert (found["n_queries"], found["n_documents"]) == (3, 12)
    refused = run(*command, "--queries", "3")
    assert refused.exit_code == 2 and "--queries and --documents go together" in refused.stderr
