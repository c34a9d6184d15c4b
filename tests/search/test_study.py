"""Whole studies on real text: Tune, Optuna, Train with two DeepSpeed workers, Data and FAISS."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest
import ray
import yaml

from effir_ray.cluster.connection import connect
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Schedule
from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.results.comparison import compare
from effir_ray.results.query import query
from effir_ray.results.report import report
from effir_ray.results.selection import pareto
from effir_ray.search.folder import STAGES_FOLDER
from effir_ray.search.study import clean, search
from effir_ray.search.trial import repeat
from tests.helpers.search_examples import small_space, write_corpus

TRAINING = {
    "steps": 3,
    "batch_size": 8,
    "lora": None,
    "workers": 2,
    "query_max_length": 16,
    "document_max_length": 32,
}


def builds(out: Path) -> list[str]:
    """``stage key`` of every stage that was ever finished, in order."""
    return [
        " ".join(line.split()[:2]) for line in (out / STAGES_FOLDER / "runs.log").read_text().splitlines()
    ]


def kill_the_trial(out: Path) -> None:
    """Once it has pruned a model, which a new process need not do again."""
    deadline = time.monotonic() + 500
    while not list(out.glob("stages/pruned/*/stage.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            if "ImplicitFunc" in " ".join(process.cmdline()):
                process.kill()


@pytest.mark.integration
def test_a_study_from_backbone_to_tested_front_and_a_repeated_trial(tmp_path: Path) -> None:
    """One of its trials loses its process on the way. Wanted is a smaller model, whatever its speed."""
    killer = threading.Thread(target=kill_the_trial, args=(tmp_path / "study",), daemon=True)
    killer.start()
    space = small_space(
        base_training=TRAINING,
        recovery=TRAINING,
        schedules=[{"drop_mlp": 1, "width_reduction": 0.5, "recover": True}],
        parameters={"drop_attention": [1, 2], "drop_mlp": [0]},
        trials=1,
        threads=2,
        objectives=["ndcg_at_10", "parameters"],
        constraints=["parameter_ratio < 1", "document_ms > 0"],
    )
    connect(num_cpus=2)
    try:
        result = search(space, tmp_path / "study")
        rows = store.read([tmp_path / "study"]).to_pylist()
        dev = [row for row in rows if row["split"] == "dev"]
        assert [row["status"] for row in rows] == ["ok"] * len(rows)
        assert len(dev) == result.trials == 3
        full, trained = (
            next(row for row in dev if row["schedule"] == schedule) for schedule in ("full", "1M-w50+ft")
        )
        assert sorted(row["attempt"] for row in dev) == [1, 1, 2]
        assert trained["attempt"] == 2
        assert not (tmp_path / "study" / STAGES_FOLDER / "locks").exists()
        for kind in ("pruned", "recovered"):  # of what is beaten, or trained further, only small files stay
            models = len(list(tmp_path.glob(f"study/stages/{kind}/*/checkpoint")))
            assert models <= sum(row["trial_id"] in result.front for row in dev if row != full)
        tested = {row["trial_id"] for row in rows if row["split"] == "test"}
        assert tested == {*result.front, full["trial_id"]}
        assert full["trial_id"] not in result.front
        told = optuna.load_study(
            study_name="tiny", storage=f"sqlite:///{tmp_path}/study/optuna.db"
        ).get_trials()
        assert [sorted(trial.constraints) for trial in told] == [
            ["document_ms > 0.0", "parameter_ratio < 1.0"]
        ]
        seen = optuna.load_study(
            study_name="tiny, all trials", storage=f"sqlite:///{tmp_path}/study/optuna.db"
        ).get_trials()
        assert {trial.user_attrs["trial_id"] for trial in seen} == {row["trial_id"] for row in dev}
        assert sum("test_ndcg_at_10" in trial.user_attrs for trial in seen) == len(tested)
        steps = query(
            tmp_path / "study", "SELECT step, loss FROM curves JOIN trials USING (model) WHERE recovered"
        )
        assert sorted(set(steps["step"].to_pylist())) == [1, 2, 3] and min(steps["loss"].to_pylist()) > 0
        measured = query(tmp_path / "study", "SELECT unit, layer FROM importance").to_pylist()
        assert len(measured) == 3 * 4 * len(list(tmp_path.glob("study/stages/importance/*")))
        assert all(row["parameters"] and row["document_ms"] and row["document_speedup"] for row in dev)
        assert trained["parameter_ratio"] < 1 == full["parameter_ratio"]
        stages = Counter(builds(tmp_path / "study"))
        assert max(stages.values()) == 1
        assert sum(stage.startswith("base ") for stage in stages) == 1

        again = repeat([tmp_path / "study"], trained["trial_id"], tmp_path / "again", split="dev")
        for then, now in again:
            assert now.ndcg_at_10 == pytest.approx(then.ndcg_at_10, abs=1e-4)
            assert now.map_at_100 == pytest.approx(then.map_at_100, abs=1e-4)
        with pytest.raises(InputError, match="--resume"):
            search(space, tmp_path / "study")
        assert clean(tmp_path / "study", keep="none").kept_bytes == 0
        assert search(space, tmp_path / "study", resume=True).front == result.front
    finally:
        ray.shutdown()


@pytest.mark.integration
def test_two_real_backbones_on_two_data_sets_end_with_one_front_and_each_ones_own(tmp_path: Path) -> None:
    other = str(write_corpus(tmp_path / "colours"))
    space = small_space(
        datasets=["stdlib", other],
        backbones=["minilm-l6", {"backbone": "smollm2-135m", "first_blocks": 2}],
        seeds=[0, 1],
        schedules=[{"drop_mlp": 1}, {"vocabulary": 8000}],
        parameters={"drop_attention": [1, 3]},
        trials=2,
    )
    out = tmp_path / "study"
    result = search(space, out)
    everything = store.read([out]).to_pylist()
    rows = [row for row in everything if row["dataset"] == f"mean of stdlib, {other}"]
    assert {row["status"] for row in everything} == {"ok"}
    assert Counter(row["seed"] for row in rows if row["split"] == "dev")[0] == 8
    apart = {(row["trial_id"], row["split"], row["dataset"]): row["ndcg_at_10"] for row in everything}
    for row in rows:
        single = [apart[row["trial_id"], row["split"], name] for name in ("stdlib", other)]
        assert row["ndcg_at_10"] == pytest.approx(sum(single) / 2)
    assert len(apart) == len(everything) == 3 * len(rows)
    again = [row for row in rows if row["seed"] == 1]
    rows = [row for row in rows if row["seed"] == 0]
    full = {row["backbone"]: row for row in rows if row["split"] == "dev" and row["schedule"] == "full"}
    read = [json.loads(full[name]["contents"]) for name in space.backbone_names]
    assert read[0]["dataset"] == read[1]["dataset"] and read[0]["backbone"] != read[1]["backbone"]
    assert {row["parameter_ratio"] for row in full.values()} == {1.0}
    tested = {row["trial_id"] for row in rows if row["split"] == "test"}
    assert tested == {*result.front, *(row["trial_id"] for row in full.values())}
    assert Counter(row["split"] for row in again) == {"dev": len(tested), "test": len(tested)}
    joint = pareto(out, where="seed = 0")
    assert sorted(joint["trial_id"].to_pylist()) == sorted(result.front)
    assert set(pareto(out)["seeds"].to_pylist()) <= {1, 2}
    assert set(json.loads(joint["datasets"][0].as_py())) == {"stdlib", other}
    for name in space.backbone_names:
        own = pareto(out, where=f"backbone = '{name}'")
        assert set(own["backbone"].to_pylist()) == {name} and len(own) >= 1
    built = Counter(stage.split()[0] for stage in builds(out))
    assert built["bm25"] == 4  # of dev and test of each data set, not of each backbone
    differences = compare(out).to_pylist()
    assert {row["dataset"] for row in differences} == {rows[0]["dataset"]}
    chosen = next(row for row in rows if row["trial_id"] in result.front and row["split"] == "test")
    again = repeat([out], chosen["trial_id"], tmp_path / "again", split="test")
    assert [then.dataset for then, _ in again] == [now.dataset for _, now in again] and len(again) == 3
    assert all(now.ndcg_at_10 == pytest.approx(then.ndcg_at_10, abs=1e-4) for then, now in again)
    page = report(out, tmp_path / "report.html").read_text()
    assert "smollm2-135m" in page and "minilm-l6" in page
    assert search(space, out, resume=True).front == result.front
    assert clean(out, keep="none").kept_bytes == 0


@pytest.mark.integration
def test_a_killed_study_resumes_without_doing_anything_twice(tmp_path: Path) -> None:
    """Its backbone is a compressed checkpoint, which is searched like any other model."""
    small = compress("random:llama", Schedule(drop_mlp=(1,), drop_attention=(2,)), tmp_path / "small")
    data = write_corpus(tmp_path / "data")
    schedules = [{"drop_mlp": 1}, {"drop_attention": 1}, {"drop_block": 1}]
    backbone = str(tmp_path / "small")
    space = small_space(backbone=backbone, dataset=str(data), dev={}, test={}, schedules=schedules)
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(space.model_dump(mode="json")))
    out = tmp_path / "study"
    code = "import sys; from effir_ray import run_search; run_search(sys.argv[1], sys.argv[2], resume=True)"
    command = [sys.executable, "-c", code, str(file), str(out)]

    for rows_before_kill in (0, 2):
        _run_until(command, out, rows_before_kill)
    subprocess.run(command, check=True, timeout=400)

    rows = store.read([out]).to_pylist()
    names = Counter(row["schedule"] for row in rows if row["split"] == "dev")
    assert names == {"full": 1, "1M": 1, "1A": 1, "1B": 1}
    sizes = {row["schedule"]: row["parameters"] for row in rows}
    assert sizes["1B"] < sizes["1M"] == sizes["1A"] == sizes["full"] == small.parameters
    assert all(row["status"] == "ok" for row in rows)
    assert max(Counter((row["trial_id"], row["split"]) for row in rows).values()) == 1
    assert max(Counter(builds(out)).values()) == 1
    assert not list(out.glob("activity/*"))


def _run_until(command: list[str], out: Path, rows: int) -> None:
    """Start the study and kill it hard once it has written a stage more after ``rows`` rows."""
    process = subprocess.Popen(command, start_new_session=True)
    log, before = out / STAGES_FOLDER / "runs.log", 0
    try:
        deadline = time.monotonic() + 300
        while len(list(out.glob("rows/*.parquet"))) < rows or not log.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = len(builds(out))
        while len(builds(out)) == before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
