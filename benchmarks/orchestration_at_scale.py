"""``python benchmarks/orchestration_at_scale.py``: a study's driver with 200 trials at once and 1,000 in all.

Trials take no time here: each is handed out, its row is written and taken in, as by 200 processes that share
a folder. What is measured is the driver alone: the sampler, the choice of what to do next, the front, what is
deleted, the estimate of what is left. Tune, and the start of 200 processes, are not in it (a Tune run adds
0.06 s a trial: see orchestration.py). One line for every hundred trials, in milliseconds a trial.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from orchestration import write_data

from effir_ray.evaluation.rows import make_row
from effir_ray.mirrors import Mirror
from effir_ray.results import store
from effir_ray.search.disk import Collector
from effir_ray.search.dry_run import load_backbones
from effir_ray.search.proposals import Proposals
from effir_ray.search.searcher import FILE, ROW, ScheduleSearcher
from effir_ray.search.space import SearchSpace
from effir_ray.search.time_estimate import TimeEstimate
from effir_ray.search.trial import sources_of
from effir_ray.search.trial_config import TrialConfig
from effir_ray.stages import StageStore

PARTS = ("propose", "write a row", "take it in", "delete", "estimate")


def space_of(trials: int, data: Path, sampled: int) -> SearchSpace:
    counts = product(range(4), range(4), [place / 100 for place in range(90)])
    schedules = [
        {"drop_mlp": mlp, "drop_attention": attention, "width_reduction": width, "width_method": "magnitude"}
        for mlp, attention, width in counts
        if mlp or attention or width
    ]
    return SearchSpace.model_validate(
        {
            "name": "scale",
            "backbone": "random:llama",
            "dataset": str(data),
            "objectives": ["ndcg_at_10", "parameters"],
            "schedules": schedules[: trials - sampled - 1],
            "parameters": {"drop_mlp": [0, 1, 2, 3], "width_reduction": [0.901, 0.999, 0.001]},
            "trials": sampled,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--actors", type=int, default=200)
    parser.add_argument("--sampled", type=int, default=100, help="of these, chosen by the sampler")
    options = parser.parse_args()
    print("| trials | " + " | ".join(PARTS) + " | all, ms a trial |")
    print("|---" * (len(PARTS) + 2) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        space = space_of(options.trials, write_data(Path(scratch) / "data"), options.sampled)
        for done, spent in simulate(space, Path(scratch) / "study", options.actors):
            cells = [f"{10 * spent[part]:.1f}" for part in PARTS]
            print(f"| {done} | {' | '.join(cells)} | {10 * sum(spent.values()):.1f} |", flush=True)


def simulate(space: SearchSpace, out: Path, actors: int) -> Iterator[tuple[int, Counter[str]]]:
    """After every hundred trials how many there were, and the seconds of each part for these."""
    out.mkdir()
    draw, spent = random.Random(0), Counter[str]()
    backbones, sources = load_backbones(space), {space.backbone: sources_of(space)}
    proposals, stages = Proposals(space, out, [], backbones), StageStore(out / "stages")
    collector, estimate = Collector(proposals, stages, sources), TimeEstimate(stages, backbones, sources)
    searcher = ScheduleSearcher(proposals, Mirror(out), lambda request, row: None)
    running: deque[tuple[str, TrialConfig, str, int]] = deque()
    done = 0

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent[part] += time.perf_counter() - began

    while True:
        while len(running) < actors:
            name = f"trial-{done + len(running)}"
            with timed("propose"):
                asked = searcher.suggest(name)
            if not isinstance(asked, dict):
                break
            config = TrialConfig.model_validate_json(asked["trial"])
            running.append((name, config, asked["split"], asked["attempt"]))
        if not running:
            break
        name, config, split, attempt = running.popleft()
        size = 1 - 0.1 * config.schedule.drop_mlp - 0.3 * config.schedule.width_reduction
        row = make_row(
            study=space.name,
            trial_id=config.id,
            trial=config.model_dump_json(),
            schedule=config.name,
            backbone=config.backbone,
            dataset=config.measured_on,
            split=split,
            seed=config.seed,
            attempt=attempt,
            ndcg_at_10=0.5 * size + 0.1 * draw.random(),
            parameters=int(1e6 * size),
            document_speedup=1 / size,
        )
        with timed("write a row"):
            file = store.append(out, [row])
        with timed("take it in"):
            searcher.on_trial_complete(name, {ROW: row.model_dump_json(), FILE: file.name})
        with timed("delete"):
            collector.collect()
        if done % 10 == 0:  # the display asks twice a second
            with timed("estimate"):
                estimate.seconds_left(*proposals.to_come(), [])
        done += 1
        if done % 100 == 0:
            yield done, spent
            spent.clear()


if __name__ == "__main__":
    main()
