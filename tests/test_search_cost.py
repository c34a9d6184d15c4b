"""benchmarks/search_cost.py on a table whose answer is known."""

from __future__ import annotations

import pytest

from benchmarks import search_cost
from effir_ray.search.candidates import Candidate
from effir_ray.search.trial_config import TrialConfig
from tests.helpers.search_examples import row


def quality(config: TrialConfig, *, early: float) -> float:
    """The more is left the better; after few steps the score is ``early`` times that of the end."""
    schedule = config.schedule
    dropped = 0.15 * int(schedule.drop_block) + 0.05 * int(schedule.drop_mlp)
    left = 1 - dropped - 0.2 * schedule.width_reduction
    return left * (early if config.recovery is not None and config.recovery.stop_after else 1.0)


@pytest.mark.parametrize("early", [0.9, -0.9], ids=["early scores tell", "early scores mislead"])
def test_strategies_pay_for_their_parts_and_find_what_early_scores_tell(early: float) -> None:
    space = search_cost.grid(0)
    schedules = [space.rungs(space.trial(candidate)) for candidate in (Candidate(), *space.schedules)]
    assert len(schedules) == 48 and [len(rungs) for rungs in schedules] == [1] + [3] * 47
    rows = {}
    for rungs in schedules:
        for part in rungs:
            size = int(1e6 * quality(part.until(None), early=1.0))
            rows[part.id] = row(part, 0.5 + quality(part, early=early) / 2, parameters=size)
    costs = {trial: {"start": 10.0, "steps": 10.0, "rest": 5.0} for trial in rows}
    lines = [[cell.strip() for cell in line.split("|")] for line in search_cost.table(space, rows, costs)]
    found = {line[2]: line for line in lines if len(line) > 3 and line[2].startswith(("grid", "halving"))}
    assert found["grid"][3:8] == ["47", "47", "1.000", "1.00", "1.00"]
    # Each part 25 s, of the grid's 47 trainings 10 + 3 * 10 + 5 s: (47 + 16 + 6) * 25 / (47 * 45).
    three = found["halving, factor 3, 3 rungs"]
    assert three[3:5] == ["69", "6"] and three[6] == f"{69 * 25 / (47 * 45):.2f}"
    assert three[7] == f"{69 * 15 / (47 * 35):.2f}"
    assert float(three[5]) < 1
    tau = [line[0] for line in lines if line[0].startswith("Kendall")]
    told = [float(line.rsplit(" ", 1)[1]) for line in tau]
    assert told == pytest.approx([1.0, 1.0] if early > 0 else [-1.0, -1.0], abs=0.02)  # equal sizes may tie


def test_an_elastic_study_pays_for_what_it_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """47 models without a training of their own, of which every fifth then trains 18 steps."""
    monkeypatch.setattr(search_cost, "ELASTIC", ((36, 18, 5, 0),))
    space, own = search_cost.grid(0), search_cost.elastic(search_cost.grid(0), 36, 18, 5, 0)
    parts = [own.rungs(own.trial(candidate)) for candidate in own.schedules]
    stops = [[part.recovery.stop_after for part in each if part.recovery] for each in parts]
    assert stops == [[0, None]] * 47
    schedules = [space.rungs(space.trial(candidate)) for candidate in (Candidate(), *space.schedules)]
    rows = {
        part.id: row(part, quality(part, early=0.9), parameters=int(1e6 * quality(part, early=1.0)))
        for rungs in schedules
        for part in rungs
    }
    for part in (*(each[0] for each in parts), parts[0][1]):
        made = row(part, 0.5, parameters=1)
        rows[part.id] = made.model_copy(update={"study": own.name})
    each = {"start": 10.0, "steps": 10.0, "rest": 5.0}
    costs = dict.fromkeys(rows, each) | {own.name: {"start": 30.0, "steps": 300.0, "rest": 100.0}}
    lines = [[cell.strip() for cell in line.split("|")] for line in search_cost.table(space, rows, costs)]
    (elastic,) = (line for line in lines if len(line) > 3 and line[2].startswith("elastic"))
    assert elastic[2:5] == ["elastic, 36 steps, 1 in 5 does 18 more", "48", "1"]
    assert elastic[6:8] == [f"{430 / (47 * 45):.2f}", f"{400 / (47 * 35):.2f}"]
    assert float(elastic[5]) > 0, "the smallest of all"
    del costs[own.name]
    assert not [line for line in search_cost.table(space, rows, costs) if "elastic" in line]


def test_the_area_is_that_of_the_steps() -> None:
    configs = [search_cost.grid(0).trial(Candidate(drop_block=drop)) for drop in range(4)]
    points = [(0.9, 40), (0.8, 20), (0.7, 30), (0.5, 10)]
    rows = {c.id: row(c, score, parameters=size) for c, (score, size) in zip(configs, points, strict=True)}
    area = search_cost.volume(list(rows), rows, list(rows))
    assert area == pytest.approx((0.8 - 0.5) * (40 - 20))  # the largest and the worst are the corner
