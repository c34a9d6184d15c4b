"""The report: one file, complete, and safe against what rows contain."""

import json
import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from effir_ray.errors import InputError
from effir_ray.results import query_scores, store
from effir_ray.results import report as report_module
from effir_ray.results.page_data import LABELS
from effir_ray.results.query_scores import METRICS
from effir_ray.results.report import report
from effir_ray.results.schema import DIRECTIONS, TrialRow

EVIL = "</script><script>alert(1)</script>"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    base = {"study": f"s {EVIL}", "trial": "{}", "backbone": "b", "dataset": "scifact"}
    rows = [
        TrialRow(
            **base, trial_id=str(i), schedule=f"{i}M", split=split, ndcg_at_10=0.6 - i / 10, parameters=90 - i
        )
        for i in range(3)
        for split in ("test", "dev")
    ]
    failed = TrialRow(**base, trial_id="f", schedule="9M", split="dev", status="failed", reason=f"NaN {EVIL}")
    store.append(tmp_path / "study", [*rows, failed])
    return tmp_path / "study"


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_holds_every_row_and_needs_no_network(study: Path, tmp_path: Path) -> None:
    page = report([study], tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    data = data_of(page)
    assert [(row["schedule"], row["split"]) for row in data["rows"]][:3] == [
        (f"{i}M", "dev") for i in range(3)
    ]
    assert len(data["rows"]) == 6
    assert data["failed"][0]["schedule"] == "9M"
    assert {row["dataset"] for row in data["published"]} == {"SciFact"}
    assert "default-src 'none'" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', page)


def test_text_of_rows_cannot_become_markup(study: Path, tmp_path: Path) -> None:
    page = report([study], tmp_path / "report.html").read_text(encoding="utf-8")
    assert EVIL not in page
    embedded = page.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in embedded  # not even the "<!--" after which a parser would wait for another end
    assert data_of(page)["failed"][0]["reason"] == f"NaN {EVIL}"


def test_the_script_writes_no_text_of_rows_as_markup() -> None:
    """A property of a row never stands between tags without ``escape``."""
    page = files("effir_ray.results").joinpath("page")
    script = "".join(
        page.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in ("report", "figures")
    )
    markup = [line for line in script.splitlines() if re.search(r"<\w+>", line)]
    assert markup
    assert not [line for line in markup if re.search(r"\$\{\w+\.\w+\}", line)]


def test_a_page_says_which_rows_are_no_comparison(tmp_path: Path) -> None:
    """Rows of another sample, or of another version of the data, name theirs."""
    base = {"study": "s", "trial": "{}", "backbone": "b", "dataset": "d", "schedule": "1M", "ndcg_at_10": 0.5}
    versions = [json.dumps({"dataset": letter * 64}) for letter in "aab"]
    rows = [
        TrialRow(**base, trial_id=str(i), split="dev", sample=f"{i} queries", contents=version)
        for i, version in enumerate(versions)
    ]
    store.append(tmp_path / "study", rows)
    page = report([tmp_path / "study"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(row["sample"] for row in data_of(page)["rows"]) == [
        "0 queries, version aaaaaaaa",
        "1 queries, version aaaaaaaa",
        "2 queries, version bbbbbbbb",
    ]


def test_a_page_draws_what_stays_of_every_block_and_how_far_it_is_from_the_full_model(tmp_path: Path) -> None:
    base = {"study": "s", "trial": "{}", "backbone": "b", "dataset": "d", "split": "test", "sample": "all"}
    shape = {"blocks": 3, "mlp_width": 8}
    plan = json.dumps({"1": {"skip": ["attention"], "intermediate_size": 4}, "2": {"skip": ["mlp"]}})
    rows = [
        TrialRow(**base, **shape, trial_id="0", schedule="full", ndcg_at_10=0.9),
        TrialRow(**base, **shape, trial_id="1", schedule="1M", ndcg_at_10=0.4, plan=plan),
    ]
    store.append(tmp_path / "study", rows)
    for row in rows:
        scores = {f"q{number}": dict.fromkeys(METRICS.values(), row.ndcg_at_10) for number in range(40)}
        query_scores.append(tmp_path / "study", row, scores)
    data = data_of(report([tmp_path / "study"], tmp_path / "report.html").read_text(encoding="utf-8"))
    layers = {row["trial_id"]: row["layers"] for row in data["rows"]}
    assert layers == {"0": [[True, 1.0]] * 3, "1": [[True, 1.0], [False, 0.5], [True, 0.0]]}
    against = data["against_full"]["s/1/d"]
    assert against["difference"] == pytest.approx(-0.5)
    assert against["low"] <= -0.5 <= against["high"] and against["p"] < 0.01


def test_every_objective_has_a_label() -> None:
    assert LABELS.keys() == DIRECTIONS.keys()


def test_a_picture_is_the_same_for_the_same_rows(study: Path, tmp_path: Path) -> None:
    first, second = (report([study], tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert b"nDCG@10" in first
    assert report([study], tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_whole_and_leaves_the_callers_plots_alone(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    def half(self: Figure, place: Path, **options: object) -> None:
        Path(place).write_text("half")
        raise MemoryError

    before = matplotlib.rcParams["backend"]
    whole = report([study], tmp_path / "a.svg").read_bytes()
    assert matplotlib.rcParams["backend"] == before
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(MemoryError):
        report([study], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == whole


def test_other_formats_and_empty_studies_are_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.html, \.svg or \.png"):
        report([study], tmp_path / "report.pdf")
    failed = store.read([study]).slice(6)
    (tmp_path / "failed").mkdir()
    pq.write_table(failed, tmp_path / "failed" / "rows.parquet")
    with pytest.raises(InputError, match="no successful trial"):
        report([tmp_path / "failed"], tmp_path / "report.html")


def test_of_many_rows_the_fronts_and_what_was_tested_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"study": "s", "trial": "{}", "backbone": "b", "dataset": "d", "schedule": "1M"}
    rows = [
        TrialRow(**base, trial_id=f"{i:03d}", split="dev", ndcg_at_10=0.5 - i / 1000, parameters=1000 + i)
        for i in range(300)
    ]
    best = rows[0]  # best in both: the rest is behind it
    tested = TrialRow(**base, trial_id="222", split="test", ndcg_at_10=0.2, parameters=1222)
    store.append(tmp_path / "study", [*rows, tested])
    monkeypatch.setattr(report_module, "_MOST", 40)
    data = data_of(report([tmp_path / "study"], tmp_path / "r.html").read_text(encoding="utf-8"))
    shown = [(row["trial_id"], row["split"]) for row in data["rows"]]
    assert data["total"] == 301 and len(shown) == 40
    assert {(best.trial_id, "dev"), ("222", "dev"), ("222", "test")} <= set(shown)
    spread = sorted(int(trial) for trial, _ in shown)
    assert max(later - earlier for earlier, later in pairwise(spread)) < 12
    assert report([tmp_path / "study"], tmp_path / "r.svg").stat().st_size > 0


def test_a_file_that_cannot_be_read_is_named_or_left_out(study: Path, tmp_path: Path) -> None:
    (good,) = (study / "rows").glob("*.parquet")
    table = pq.read_table(good)
    broken = ["not json"] * len(table)
    index = table.schema.get_field_index("versions")
    changed = table.set_column(index, table.schema.field(index), [broken])
    pq.write_table(
        changed.replace_schema_metadata(table.schema.metadata), study / "rows" / "0-broken.parquet"
    )
    with pytest.raises(InputError, match=r"0-broken\.parquet: column versions"):
        report([study], tmp_path / "r.html")
    heard: list[str] = []
    page = report([study], tmp_path / "r.html", damaged=heard.append).read_text(encoding="utf-8")
    assert len(data_of(page)["rows"]) == 6 and len(heard) == 1 and "0-broken.parquet" in heard[0]


def test_of_many_rows_every_axis_and_sample_keeps_its_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest query is of no other front; the best of the harder sample is behind the easier one's."""
    base = {"study": "s", "trial": "{}", "backbone": "b", "dataset": "d", "split": "dev"}

    def row(number: int, sample: str, score: float, query_ms: float) -> TrialRow:
        size = {"parameters": 1000 + number, "query_ms": query_ms, "sample": sample}
        return TrialRow(**base, **size, trial_id=f"{sample}{number}", schedule="1M", ndcg_at_10=score)

    rows = [row(number, "easy", 0.9 - number / 1000, 700 + number) for number in range(150)]
    rows += [row(number, "hard", 0.5 - number / 1000, 700 + number) for number in range(150)]
    rows += [row(999, "easy", 0.1, 1.0), rows[0].model_copy(update={"trial_id": "f", "schedule": "full"})]
    store.append(tmp_path / "study", rows)
    monkeypatch.setattr(report_module, "_MOST", 30)
    shown = data_of(report([tmp_path / "study"], tmp_path / "r.html").read_text(encoding="utf-8"))["rows"]
    assert {"easy999", "hard0", "easy0", "f"} <= {row["trial_id"] for row in shown}


def test_stages_of_two_studies_stay_apart_and_one_training_serves_both(tmp_path: Path) -> None:
    base = {"trial": "{}", "backbone": "b", "dataset": "d", "split": "dev", "recovered": True}
    for number, name in enumerate(("a", "b"), start=1):
        folder = tmp_path / name / "study"
        model = "stages/recovered/abc/checkpoint"
        row = TrialRow(**base, study=name, trial_id=name, schedule="1M+ft", ndcg_at_10=0.5, model=model)
        store.append(folder, [row])
        scores = dict.fromkeys(("attention", "mlp", "block"), [float(number)] * (2 * number))
        for stage, file, content in (
            ("importance/x", "importance.json", json.dumps({"criterion": "pooled", **scores})),
            ("recovered/abc", "history.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'),
        ):
            place = folder / "stages" / stage
            place.mkdir(parents=True)
            (place / file).write_text(content)
            (place / "stage.json").write_text("{}")
    data = data_of(report([tmp_path / n / "study" for n in "ab"], tmp_path / "r.html").read_text("utf-8"))
    assert [(entry["study"].split("/")[-2], entry["units"]["mlp"]) for entry in data["importance"]] == [
        ("a", [1.0, 1.0]),
        ("b", [2.0] * 4),
    ]
    assert data["curves"] == {"stages/recovered/abc/checkpoint": {"steps": [1, 2], "loss": [2.0, 1.0]}}
