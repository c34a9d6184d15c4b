"""``python benchmarks/search_cost.py --out OUT``: what strategies find, for which part of a grid's cost.

Every schedule of a grid of depth and width is trained for real, in the parts that halving would do, and
scored on dev queries after each: hours on two cores, a line a part; what was stopped goes on. The strategies
then search that table through the same ``Proposals`` that a study asks, and pay what the parts took. The
front of the whole grid, every training to its end, is what they are measured by. Elastic studies train other
models, so they are really run. Seeds are trained one by one (``--seed 1``); ``--table`` prints what is there.

OUT/rows        a row a part: ordinary rows, which ``effir-ray query`` reads
OUT/costs.json  seconds of starting, of steps and of everything else, by trial id
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from effir_ray.cluster.connection import connect
from effir_ray.cluster.devices import machine
from effir_ray.files import write_whole
from effir_ray.hardware import Hardware
from effir_ray.results import store
from effir_ray.results.schema import TrialRow
from effir_ray.search.candidates import Candidate
from effir_ray.search.dry_run import load_backbones
from effir_ray.search.elastic import ElasticTraining
from effir_ray.search.folder import STAGES_FOLDER
from effir_ray.search.halving import Halving
from effir_ray.search.proposals import Proposals
from effir_ray.search.shapes import solver
from effir_ray.search.space import SearchSpace
from effir_ray.search.trial import run_trial, sources_of
from effir_ray.search.trial_config import TrialConfig
from effir_ray.search.trial_stages import trial_stages
from effir_ray.stages import StageStore
from effir_ray.training.config import STATE
from effir_ray.training.run.history import HISTORY, read_history

DEPTH_AND_WIDTH = tuple(itertools.product(range(4), range(3), (0.0, 0.25, 0.5, 0.75)))
ELASTIC = ((36, 18, 5, 0), (36, 18, 5, 12))
"""Steps of all together, steps of each, of how many one goes on, and for how many budgets a solver finds
shapes."""
DRAWS = 200  # of random search


def grid(seed: int) -> SearchSpace:
    """47 compressed models of MiniLM, each to be recovered by distillation from the full one."""
    lengths = {"query_max_length": 32, "document_max_length": 64}
    schedules = [
        {"drop_block": blocks, "drop_mlp": mlps, "width_reduction": width, "recover": True}
        for blocks, mlps, width in DEPTH_AND_WIDTH
        if blocks or mlps or width
    ]
    given = {"importance": "pooled", "width_method": "magnitude"}
    return SearchSpace.model_validate(
        {
            "name": f"search-cost-{seed}",
            "backbone": "minilm-l6",
            "dataset": "stdlib",
            "dev": {"queries": 200, "documents": 400},
            "test": {"queries": 200, "documents": 400},
            **lengths,
            "calibration_texts": 32,
            "timing": {"queries": 8, "documents": 16, "rounds": 6},
            "recovery": {
                "info_nce": 0,
                "distillation": {"teacher": "base", "embedding": 1.0},
                "steps": 54,
                "batch_size": 16,
                "learning_rate": 2e-4,
                "lora": None,
                "hard_negatives": 0,
                "cpus_per_worker": 2,
                **lengths,
            },
            "schedules": [{**given, **schedule} for schedule in schedules],
            "strategy": "halving",
            "objectives": ["ndcg_at_10", "parameters"],
            "seed": seed,
        }
    )


def measure(space: SearchSpace, out: Path) -> None:
    """The full model, then every part of every schedule, of which only the small files are kept."""
    rows, costs = known(out), read_costs(out)
    connect()
    stages, here = StageStore(out / STAGES_FOLDER), machine()
    schedules = [space.rungs(space.trial(candidate)) for candidate in (Candidate(), *space.schedules)]

    def run(config: TrialConfig, study: str, place: str) -> TrialRow:
        """One part that has no row yet."""
        (row,) = run_trial(config, stages, study=study, out=out, here=here)
        rows[config.id] = row
        store.append(out, [row])
        print(f"{place} {config.name}: nDCG@10 {row.ndcg_at_10 or 0.0:.4f}", flush=True)
        return row

    def pay(name: str, cost: Mapping[str, float]) -> None:
        costs[name] = cost
        write_whole(out / "costs.json", json.dumps(costs, indent=1) + "\n")

    (full,), *grown = schedules
    if full.id not in rows:
        run(full, space.name, "full")
    for variant in ELASTIC:
        own = elastic(space, *variant)
        with tempfile.TemporaryDirectory() as folder:
            backbones, sources = load_backbones(own), {own.backbone: sources_of(own, here)}
            solve, asked = solver(own, backbones, stages, sources), []
            study = Proposals(own, Path(folder), [rows[full.id]], backbones, solve)
            while (request := study.next()) is not None and request.split == "dev":
                asked.append(request.config)
                row = rows.get(request.config.id)
                study.finished(row or run(request.config, own.name, own.name))
        if own.name not in costs:
            pay(own.name, cost_of_study(asked, full, stages, here))
    for variant in ELASTIC:
        for row in [row for row in rows.values() if row.study == elastic(space, *variant).name]:
            free(TrialConfig.of(row), stages)
    for number, parts in enumerate(grown, start=1):
        steps_before = 0
        for config in parts:
            if config.id not in rows or config.id not in costs:
                row = run(config, space.name, f"{number}/{len(grown)}")
                pay(config.id, cost_of(config, row, stages, steps_before))
            steps_before = config.recovery.stop_after or 0 if config.recovery is not None else 0
        for config in parts:
            free(config, stages)


def elastic(space: SearchSpace, together: int, alone: int, factor: int, shapes: int) -> SearchSpace:
    """The same study with one training of all sub-networks, of which one in ``factor`` then trains on."""
    assert space.recovery is not None
    return space.model_copy(
        update={
            "name": f"{space.name}-elastic-{together}-{alone}-{factor}-{shapes}",
            "strategy": "elastic",
            "elastic": ElasticTraining(steps=together, shapes=shapes),
            "halving": Halving(factor=factor, rungs=2),
            "recovery": space.recovery.model_copy(update={"steps": alone}),
        }
    )


def free(config: TrialConfig, stages: StageStore) -> None:
    """Models and states of 141 parts would be 50 GB."""
    for stage in trial_stages(config, sources_of(config), "dev"):
        if stage.stage.bulk is not None and not stage.stage.shared:
            stages.free(stage.path(stages), stage.stage.bulk)
        shutil.rmtree(stage.path(stages) / STATE, ignore_errors=True)


def cost_of(config: TrialConfig, row: TrialRow, stages: StageStore, steps_before: int) -> dict[str, float]:
    """Seconds of what this part did, without the ``steps_before`` that a shorter one had done."""
    assert row.device_seconds is not None
    if config.recovery is None:
        return {"start": 0.0, "steps": 0.0, "rest": round(row.device_seconds, 2)}
    keyed = trial_stages(config, sources_of(config), "dev")
    place = next(stage for stage in keyed if stage.name == "recovered").path(stages)
    whole = json.loads((place / "stage.json").read_text())["seconds"]
    steps = sum(line["seconds"] for line in read_history(place / HISTORY) if line["step"] > steps_before)
    return {
        "start": round(whole - steps, 2),
        "steps": round(steps, 2),
        "rest": round(row.device_seconds - whole * config.recovery.most_workers, 2),
    }


def cost_of_study(
    trials: Sequence[TrialConfig], full: TrialConfig, stages: StageStore, here: Hardware
) -> dict[str, float]:
    """Of every stage of ``trials`` once, whoever built it, but those of the full model."""
    wanted = {
        stage.key: stage for trial in trials for stage in trial_stages(trial, sources_of(trial, here), "dev")
    }
    for stage in trial_stages(full, sources_of(full, here), "dev"):
        wanted.pop(stage.key, None)
    cost = {"start": 0.0, "steps": 0.0, "rest": 0.0}
    for stage in wanted.values():
        place = stage.path(stages)
        seconds = json.loads((place / "stage.json").read_text())["seconds"]
        steps = sum(line["seconds"] for line in read_history(place / HISTORY))
        trained = stage.name in ("elastic", "recovered")
        cost["steps"] += steps
        cost["start" if trained else "rest"] += seconds - steps
    return {part: round(seconds, 2) for part, seconds in cost.items()}


def known(out: Path) -> dict[str, TrialRow]:
    if not (out / store.ROWS_FOLDER).exists():
        return {}
    return {row.trial_id: row for row in store.trial_rows(store.latest(store.read([out])))}


def read_costs(out: Path) -> dict[str, dict[str, float]]:
    file = out / "costs.json"
    return json.loads(file.read_text()) if file.exists() else {}


def found_by(space: SearchSpace, rows: Mapping[str, TrialRow]) -> list[str]:
    """The trials that a study of ``space`` runs, asked of what it would ask, in order."""
    done = []
    with tempfile.TemporaryDirectory() as folder:
        study = Proposals(space, Path(folder), [], load_backbones(space))
        while (request := study.next()) is not None and request.split == "dev":
            done.append(request.config.id)
            study.finished(rows[request.config.id])
    return done


def volume(ids: Sequence[str], rows: Mapping[str, TrialRow], everything: Sequence[str]) -> float:
    """Area that (nDCG@10, parameters) of ``ids`` dominate, from the worst of each that ``everything`` has."""

    def point(trial: str) -> tuple[float, float]:
        row = rows[trial]
        assert row.ndcg_at_10 is not None and row.parameters is not None
        return row.ndcg_at_10, float(row.parameters)

    worst = min(point(i)[0] for i in everything)
    largest = max(point(i)[1] for i in everything)
    area, best = 0.0, worst
    for size, quality in sorted((size, quality) for quality, size in map(point, ids)):  # the smallest first
        if size <= largest and quality > best:
            area += (quality - best) * (largest - size)
            best = quality
    return area


def affordable(order: Sequence[str], price: Mapping[str, float], cost: float) -> list[str]:
    """The first of ``order`` that together cost no more than ``cost``."""
    spent = itertools.accumulate(price[i] for i in order)
    return [i for i, total in zip(order, spent, strict=True) if total <= cost]


Costs = Mapping[str, Mapping[str, float]]


def table(space: SearchSpace, rows: Mapping[str, TrialRow], costs: Costs) -> list[str]:
    """One line a strategy, then how well early scores tell late ones."""
    schedules = [space.rungs(space.trial(candidate)) for candidate in space.schedules]
    missing = sum(part.id not in costs for rungs in schedules for part in rungs)
    if missing:
        raise SystemExit(f"seed {space.seed}: {missing} parts are not measured yet; run without --table")
    full = space.trial(Candidate()).id
    wholes = [rungs[-1].id for rungs in schedules]

    def alone(rungs: Sequence[TrialConfig]) -> float:
        """A training to its end in one go: one start, all steps, and scored once."""
        each = [costs[part.id] for part in rungs]
        return each[-1]["start"] + sum(part["steps"] for part in each) + each[-1]["rest"]

    price = {rungs[-1].id: alone(rungs) for rungs in schedules}
    grid_cost, grid_volume = sum(price.values()), volume([*wholes, full], rows, wholes)
    lines = []

    def line(name: str, done: object, whole: object, found: float, cost: float, without: str) -> None:
        share = f"{found / grid_volume:.3f} | {cost / grid_cost:.2f}"
        lines.append(f"| {space.seed} | {name} | {done} | {whole} | {share} | {without} |")

    started = sum(costs[i]["start"] for i in wholes)
    line("grid", len(wholes), len(wholes), grid_volume, grid_cost, "1.00")
    for factor, rungs in ((3, 3), (3, 2), (9, 2)):
        own = space.model_copy(
            update={"halving": space.halving.model_copy(update={"factor": factor, "rungs": rungs})}
        )
        ids = [i for i in found_by(own, rows) if i != full]
        cost = sum(sum(costs[i].values()) for i in ids)
        start = sum(costs[i]["start"] for i in ids)
        without = f"{(cost - start) / (grid_cost - started):.2f}"
        name, whole = f"halving, factor {factor}, {rungs} rungs", sum(i in price for i in ids)
        line(name, len(ids), whole, volume([*ids, full], rows, wholes), cost, without)
        draw, drawn = random.Random(0), []
        for _ in range(DRAWS):
            some = affordable(draw.sample(wholes, len(wholes)), price, cost)
            drawn.append((len(some), volume([*some, full], rows, wholes)))
        count, found = np.mean(drawn, axis=0)
        line("random, as dear", f"{count:.1f}", f"{count:.1f}", found, cost, "")
    for together, each, factor, shapes in ELASTIC:
        study = elastic(space, together, each, factor, shapes).name
        if study not in costs:
            continue
        ids = [i for i, row in rows.items() if row.study == study]
        cost = sum(costs[study].values())
        without = f"{(cost - costs[study]['start']) / (grid_cost - started):.2f}"
        name = f"elastic, {together} steps, 1 in {factor} does {each} more"
        name += f", {shapes} budgets solved" if shapes else ""
        whole = sum(rows[i].schedule.endswith("+ft") for i in ids)
        line(name, len(ids), whole, volume([*ids, full], rows, wholes), cost, without)
    for place in range(len(schedules[0]) - 1):
        scores = [[rows[rungs[at].id].ndcg_at_10 for rungs in schedules] for at in (place, -1)]
        steps = schedules[0][place].recovery
        assert steps is not None
        tau = kendalltau(*scores).statistic
        lines.append(f"Kendall's tau of the scores after {steps.stop_after} steps and after all: {tau:.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only print what is measured")
    given = parser.parse_args()
    space = grid(given.seed)
    if not given.table:
        given.out.mkdir(parents=True, exist_ok=True)
        measure(space, given.out.resolve())
    print("| seed | strategy | parts run | to the end | hypervolume | cost | cost without starts |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(table(space, known(given.out), read_costs(given.out))))


if __name__ == "__main__":
    main()
