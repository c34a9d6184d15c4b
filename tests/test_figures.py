"""Figures in the README and in docs are those of the committed tables."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from effir_ray.results.query import query

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


def rows(folder: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = query(RESULTS / folder, "SELECT * FROM trials").to_pylist()
    return found


def one(records: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    found = [record for record in records if all(record[name] == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def demo() -> Iterator[str]:
    found = rows("demo")
    dev = {row["schedule"]: row for row in found if row["split"] == "dev"}
    full, half = dev["full"], dev["3B+ft"]
    yield f"nDCG@10 on dev queries ({percent(half['ndcg_at_10'])} of {percent(full['ndcg_at_10'])})"
    yield f"keep {half['ndcg_at_10'] / full['ndcg_at_10']:.0%}".replace("%", " %")
    yield f"at {half['document_speedup']:.1f} times its speed"
    yield f"they keep {dev['3B']['ndcg_at_10'] / full['ndcg_at_10']:.0%}".replace("%", " %")
    yield f"leave {dev['last3B+ft']['ndcg_at_10'] / full['ndcg_at_10']:.0%}".replace("%", " %")
    yield f"BM25 is at {percent(full['bm25_ndcg_at_10'])}"
    test = {row["schedule"]: row for row in found if row["split"] == "test"}
    scores = [percent(test[name]["ndcg_at_10"]) for name in ("3B+ft", "full")]
    yield f"{scores[0]} of {scores[1]}, BM25 {percent(test['full']['bm25_ndcg_at_10'])}"


def evaluation() -> Iterator[str]:
    found = json.loads((RESULTS / "evaluation" / "evaluate.json").read_text())
    ratios: dict[str, list[float]] = {f"effir-ray {kind}": [] for kind in ("float32", "bfloat16", "int8")}
    for dataset in ("scifact", "nfcorpus"):
        peer = one(found, dataset=dataset, system="sentence-transformers + beir")
        for system, cells in ratios.items():
            cells.append(peer["seconds"] / one(found, dataset=dataset, system=system)["seconds"])
        yield f"{one(found, dataset=dataset, system='effir-ray float32')['ndcg_at_10']:.4f} (published"
    parts = [f"{a:.1f}x, {b:.1f}x in {name.split()[1]}" for name, (a, b) in ratios.items()]
    yield f"| {'; '.join(parts)}"


def encoding() -> Iterator[str]:
    """Ratios within rounds, against sentence-transformers and against OpenVINO."""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for model in ("minilm-l6", "smollm2-135m"):
        (file,) = (RESULTS / "encoding").glob(f"{model}-*-threads.parquet")
        for row in pq.read_table(file).to_pylist():
            seconds.setdefault((model, row["kind"], row["contestant"]), []).append(row["wall_seconds"])

    def ratios(kind: str, peers: dict[str, str]) -> str:
        parts = []
        for precision, peer in peers.items():
            cells = []
            for model in ("minilm-l6", "smollm2-135m"):
                both = zip(
                    seconds[model, kind, peer], seconds[model, kind, f"effir-ray {precision}"], strict=True
                )
                cells.append(f"{statistics.median(theirs / own for theirs, own in both):.2f}x")
            parts.append(f"{cells[0]}, {cells[1]} in {precision}")
        return "; ".join(parts)

    types = ("float32", "bfloat16", "int8")
    yield f"| {ratios('document', dict.fromkeys(types, 'sentence-transformers'))} |"
    openvino = dict(zip(types, ("openvino float32", "openvino", "openvino int8"), strict=True))
    yield f"| {ratios('document', openvino)} |"
    yield f"| {ratios('query', openvino)} |"


def speedup() -> Iterator[str]:
    (file,) = (RESULTS / "speedup").glob("*-float32.csv")
    (effir,) = (row for row in table(file) if "16M" in row["variant"] and "30" in row["variant"])
    got, bound = (
        [float(effir[f"{kind}_{what}"]) for kind in ("document", "query")]
        for what in ("speedup", "flop_bound")
    )
    yield f"{got[0]:.2f}x on documents, {got[1]:.2f}x on queries; the models' FLOPs"
    yield f"differ by {bound[0]:.2f}x, {bound[1]:.2f}x"


def training() -> Iterator[str]:
    found = json.loads((RESULTS / "training" / "smollm2-135m-8-blocks.json").read_text())["speedup"]
    yield f"| {found['over MNRL']:.2f}x, {found['over CachedMNRL']:.2f}x |"


def learning() -> Iterator[str]:
    found = rows("squad_learning")
    cells = []
    for name in ("squad", "scifact", "nfcorpus"):
        mine = [row for row in found if row["dataset"].startswith(f"{name}[") and row["backbone"] != "bm25"]
        before, after = (one(mine, recovered=trained)["ndcg_at_10"] for trained in (False, True))
        cells.append(f"{percent(before)} to {percent(after)}")
    yield ", ".join(cells)


def off_the_shelf() -> Iterator[str]:
    found = [row for row in rows("off_the_shelf") if row["dataset"].startswith("scifact[")]
    score = {row["schedule"]: percent(row["ndcg_at_10"]) for row in found}
    yield f"2 of 6: SciFact {score['2A']} (attention), {score['2M']} (MLP) of {score['full']}"


def vocabulary() -> Iterator[str]:
    found = [row for row in rows("vocabulary") if json.loads(row["trial"]).get("counted") != ["squad"]]
    fewer, full = (
        [one(found, schedule=name, dataset=data) for data in CORPORA] for name in ("v8000", "full")
    )
    sizes = " M of ".join(f"{each[0]['parameters'] / 1e6:.1f}" for each in (fewer, full))
    scores = " of ".join(", ".join(percent(row["ndcg_at_10"]) for row in each) for each in (fewer, full))
    yield f"{sizes} M; {scores}"


CORPORA = ("scifact", "nfcorpus", "cranfield")


@pytest.mark.parametrize(
    "figures",
    [demo, evaluation, encoding, speedup, training, learning, off_the_shelf, vocabulary],
    ids=lambda f: f.__name__,
)
def test_the_readme_says_what_the_tables_say(figures: Any) -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    missing = [text for text in figures() if text not in readme]
    assert not missing


def test_the_recovery_table_of_docs_is_that_of_the_rows() -> None:
    lines = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    section = lines[lines.index("## Recovery by distillation") :]
    written = {cells[1].strip(): cells[2:5] for line in section[:40] if len(cells := line.split("|")) == 7}
    scores: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows("recovery"):
        trial = json.loads(row["trial"])
        plan = trial.get("plan")
        kept = 6 if plan is None else sum(layer["attention"] for layer in plan["layers"])
        key = (trial["method"], kept, tuple(trial.get("learnt", ())), trial.get("steps"))
        scores.setdefault(key, {}).setdefault(row["dataset"], []).append(row["ndcg_at_10"])
    named = {
        "full model, 6 blocks": ("full", 6, (), None),
        "3 blocks, before it learns": ("cut", 3, (), None),
        "3 blocks, distilled: 1,200 steps of 32 pairs, 128 tokens": ("effir", 3, ("squad",), 1200),
        "3 blocks, distilled: 1,600 steps of 16 pairs, 256 tokens": ("effir", 3, ("squad",), 1600),
        "BM25": ("bm25", 6, (), None),
    }
    for title, key in named.items():
        expected = [
            percent(statistics.mean(scores[key][name])) for name in ("scifact", "nfcorpus", "cranfield")
        ]
        assert [cell.strip() for cell in written[title]] == expected, title


def test_the_table_of_fewer_tokens_is_that_of_the_rows() -> None:
    lines = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    section = lines[lines.index("## Fewer tokens") :]
    written = {cells[1].strip(): cells[2:7] for line in section[:30] if len(cells := line.split("|")) == 8}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows("vocabulary"):
        counted = json.loads(row["trial"]).get("counted")
        where = "all" if counted is None else "SQuAD" if counted == ["squad"] else "the three corpora"
        tokens = json.loads(row["trial"])["schedule"].get("vocabulary", 0)
        title = "all 30,522" if not tokens else f"{tokens:,}, counted in {where}"
        found.setdefault(title, {})[row["dataset"]] = row
    full = found["all 30,522"]
    assert set(found) <= set(written)
    for title, scores in found.items():
        cells = [f"{scores['scifact']['parameters'] / 1e6:.1f} M"]
        cells += [percent(scores[name]["ndcg_at_10"]) for name in ("scifact", "nfcorpus", "cranfield")]
        sums = [sum(row["ndcg_at_10"] for row in each.values()) for each in (scores, full)]
        cells.append(f"{100 * sums[0] / sums[1]:.1f} %")
        assert [cell.strip().strip("*") for cell in written[title]] == cells, title


def test_the_table_of_shorter_embeddings_is_that_of_the_rows() -> None:
    lines = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    section = lines[lines.index("## Shorter embeddings") :]
    written = {cells[1].strip(): cells[2:7] for line in section[:30] if len(cells := line.split("|")) == 8}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows("dimension"):
        trial = json.loads(row["trial"])
        where = "SQuAD" if trial.get("fitted") == "squad" else "each corpus itself"
        size = trial["schedule"].get("dimension", 0)
        found.setdefault(f"{size}, fitted on {where}" if size else "all 384", {})[row["dataset"]] = row
    full = found["all 384"]
    assert set(found) <= set(written)
    for title, scores in found.items():
        cells = [f"{scores['scifact']['index_bytes'] / 1e9:.2f} GB"]
        cells += [percent(scores[name]["ndcg_at_10"]) for name in ("scifact", "nfcorpus", "cranfield")]
        sums = [sum(row["ndcg_at_10"] for row in each.values()) for each in (scores, full)]
        cells.append(f"{100 * sums[0] / sums[1]:.1f} %")
        assert [cell.strip().strip("*") for cell in written[title]] == cells, title


def test_the_table_of_widths_is_that_of_the_rows() -> None:
    lines = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    section = lines[lines.index("## One width a layer") :]
    written = {cells[1].strip(): cells[2:5] for line in section[:30] if len(cells := line.split("|")) == 6}
    kept = [line.split("|") for line in (RESULTS / "budget" / "taylor.md").read_text().splitlines()]
    moved = {(cells[2].strip(), cells[1].strip()): cells[6].strip() for cells in kept}
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows("budget"):
        trial = json.loads(row["trial"])
        found.setdefault((trial["way"], f"{trial['blocks']} blocks"), []).append(row["ndcg_at_10"])
    assert (
        f"The full model has {percent(statistics.mean(found.pop(('full model', '6 blocks'))))}."
        in "".join(lines)
    )
    for (way, size), scores in found.items():
        title = "whole blocks, by `pooled`" if way == "whole blocks" else way
        cell = written[title][["5 blocks", "4 blocks", "3 blocks"].index(size)].strip()
        assert cell == f"{percent(statistics.mean(scores))} ({float(moved[way, size]):.3f})", (way, size)
        assert len(scores) == 2


@pytest.mark.parametrize("folder", sorted(place.name for place in RESULTS.iterdir() if place.is_dir()))
def test_every_committed_table_is_read_by_query(folder: str) -> None:
    place = RESULTS / folder
    if (place / "rows").is_dir():
        assert len(query(place, "SELECT * FROM trials")) > 0
        return
    files = [file for file in place.iterdir() if file.suffix in (".csv", ".json", ".parquet")]
    assert files
    for file in files:
        assert len(query(file, "SELECT * FROM measurements")) > 0


def test_every_folder_of_tables_is_described() -> None:
    described = (RESULTS / "README.md").read_text(encoding="utf-8")
    folders = [place.name for place in RESULTS.iterdir() if place.is_dir()]
    assert folders
    assert not [name for name in folders if f"| `{name}` |" not in described]
