"""Studies whose trials run in parts, driven without computing anything: scores follow from the schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effir_ray.search.dry_run import load_backbones
from effir_ray.search.proposals import Proposals, TrialRequest
from effir_ray.search.space import SearchSpace
from tests.helpers.search_examples import row, small_space

SCHEDULES = [
    {"drop_mlp": drop, "recover": True}
    for drop in ([0], [1], [2], [3], [0, 1], [0, 2], [1, 2], [0, 3], [1, 3])
]


def halving_space(**changes: Any) -> SearchSpace:
    settings = {
        "recovery": {"steps": 18, "batch_size": 4},
        "schedules": SCHEDULES,
        "strategy": "halving",
        "objectives": ["ndcg_at_10", "parameters"],
    }
    return small_space(**(settings | changes))


def proposals(space: SearchSpace, out: Path, rows: Any = ()) -> Proposals:
    out.mkdir(exist_ok=True)
    return Proposals(space, out, list(rows), load_backbones(space))


def score(request: TrialRequest) -> Any:
    """Two dropped MLPs are smaller; of one size the later blocks are the better ones to drop, and training
    helps."""
    config = request.config
    drops = config.schedule.drop_mlp or ()
    assert isinstance(drops, tuple)
    steps = 0 if config.recovery is None else config.recovery.stop_after or config.recovery.steps or 0
    quality = 0.9 if not drops else 0.5 + 0.02 * sum(drops) / len(drops) - 0.05 * len(drops) + 0.001 * steps
    return row(config, quality, split=request.split, parameters=100 - 10 * len(drops))


def run(study: Proposals, *, at_once: int = 1, stop_after: int | None = None) -> list[TrialRequest]:
    """Requests in the order in which they were handed out."""
    done: list[TrialRequest] = []
    running: list[TrialRequest] = []
    while stop_after is None or len(done) < stop_after:
        while len(running) < at_once and (request := study.next()) is not None:
            done.append(request)
            running.append(request)
        if not running:
            return done
        study.finished(score(running.pop(0)))
    return done


def names(requests: list[TrialRequest], split: str = "dev") -> list[str]:
    return [request.config.name for request in requests if request.split == split]
