"""How the stages of a trial that are models come about, and what they are cut by.

Model folders hold ``checkpoint`` and ``plan.json``. A stage reads the folders of its parents and writes its
own. Ray is imported where it is used: a dry run reads the declarations, in ``trial_stages``, without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from effir_ray import hardware
from effir_ray.compression.dimension import shorten
from effir_ray.compression.pipeline import (
    count_tokens,
    cut,
    depth_plan,
    importance_scores,
    load_to_measure,
    narrowing_losses,
    neuron_scores,
    principal_axes,
)
from effir_ray.compression.planning import ImportanceScores, narrow_plan, with_dimension, with_vocabulary
from effir_ray.compression.schedule import Calibration
from effir_ray.compression.vocabulary import choose_tokens, cut_vocabulary
from effir_ray.errors import InputError, TrialFailure
from effir_ray.models import folder
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.loading import load_config, load_text_side
from effir_ray.models.names import resolve
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import load_retriever
from effir_ray.search.elastic import networks
from effir_ray.search.stage_graph import KeyedStage, StageTask
from effir_ray.search.trial_config import TrialConfig
from effir_ray.stages import StageStore
from effir_ray.training.config import STATE, TrainConfig

CHECKPOINT = "checkpoint"
PLAN = "plan.json"
IMPORTANCE = "importance.json"
NEURONS = "neurons.npz"
TOKENS = "tokens.npy"
AXES = "axes.npy"

SHAPES = "losses.json"

_TRAININGS = {"base": "base_training", "elastic": "elastic", "recovered": "recovery"}
"""Stage -> field of its settings."""


def settle(config: TrialConfig) -> None:
    """What sums and draws depend on besides a stage's own inputs, in whatever process computes."""
    torch.set_num_threads(config.threads or hardware.available_cores())
    torch.manual_seed(config.seed)


def make_backbone(task: StageTask) -> None:
    """The uncompressed model as a checkpoint folder; a folder that is used whole is linked, not read."""
    name, first_blocks = task.config.backbone, task.config.first_blocks
    source = resolve(name)
    prompts = task.config.prompts
    if source.kind == "folder" and source.path is not None and first_blocks is None and prompts is None:
        (task.out / CHECKPOINT).symlink_to(source.path.resolve(), target_is_directory=True)
        write_plan(task.out, folder.read_plan(source.path, load_config(name)))
        return
    retriever = load_retriever(name, dtype="auto", first_blocks=first_blocks)
    retriever.spec = retriever.spec.with_prompts(prompts)
    save_checkpoint(retriever, task.out / CHECKPOINT)
    write_plan(task.out, retriever.plan)


def fine_tune(choose: Callable[[TrialConfig], TrainConfig | None]) -> Callable[[StageTask], None]:
    """Fine-tuning of the parent with the settings that ``choose`` takes from a trial; the study's full model,
    where it is the teacher, is another parent."""

    def build(task: StageTask) -> None:
        training = choose(task.config)
        assert training is not None
        _train(task, task.parent("model") / CHECKPOINT, training, begun=_begun(task))
        write_plan(task.out, read_plan(task.parent("model")))

    return build


def _train(task: StageTask, model: Path, training: TrainConfig, *, begun: Path | None = None) -> None:
    from effir_ray.training.run.launcher import train

    if "teacher" in task.parents:
        training = _taught_by(training, task.parent("teacher") / CHECKPOINT)
    if task.store.remote and training.storage_path is None:  # workers of other machines reach it
        training = training.model_copy(update={"storage_path": task.store.checkpoints})
    train(model, training, task.out, stages=task.store, begun=begun)


def elastic_training(config: TrialConfig) -> TrainConfig:
    """The settings of ``recovery`` for the one training that comes before; its networks are not known yet."""
    assert config.recovery is not None and config.elastic is not None
    return config.recovery.model_copy(update={"steps": config.elastic.steps, "stop_after": None})


def sort_neurons(task: StageTask) -> None:
    """The full model with every MLP's neurons sorted: any width is then the first of them."""
    from effir_ray.training.step.elastic import prepare_elastic

    prepare_elastic(task.parent("model") / CHECKPOINT, _neurons(task), task.out / CHECKPOINT)
    write_plan(task.out, read_plan(task.parent("model")))


def train_elastic(task: StageTask) -> None:
    """The full model, trained as the networks between it and the smallest one at once."""
    elastic, plan = task.config.elastic, read_plan(task.parent("model"))
    assert elastic is not None
    ladder = networks(elastic.smallest, plan, _importance(task))
    training = elastic_training(task.config).model_copy(update={"elastic": ladder})
    _train(task, task.parent("model") / CHECKPOINT, training)
    write_plan(task.out, plan)


def mean_workers(choose: Callable[[TrialConfig], TrainConfig | None]) -> Callable[[StageTask], float]:
    """Of a training with those settings, over the seconds of its steps; a run's start and end count alike."""

    def workers(task: StageTask) -> float:
        training = choose(task.config)
        assert training is not None
        if isinstance(training.workers, int):
            return training.workers
        steps = _steps(task.out.joinpath)
        return float(np.average([row["workers"] for row in steps], weights=[row["seconds"] for row in steps]))

    return workers


def training_workers(stages: Sequence[KeyedStage], store: StageStore) -> dict[str, list[tuple[int, int]]]:
    """Training of a trial with these ``stages`` -> (first step, workers) of each part that ran with another
    number of workers than the one before. Of a training that older code did nothing is known.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for keyed in stages:
        if keyed.name not in _TRAININGS:
            continue
        parts: list[tuple[int, int]] = []
        for row in _steps(partial(store.small, keyed.path(store))):
            if not parts or parts[-1][1] != row["workers"]:
                parts.append((row["step"], row["workers"]))
        if parts:
            found[_TRAININGS[keyed.name]] = parts
    return found


def _steps(find: Callable[[str], Path]) -> list[dict[str, Any]]:
    """The rows of a training whose files ``find`` finds, where they say how many workers there were."""
    from effir_ray.training.run.history import HISTORY, read_history

    return [row for row in read_history(find(HISTORY)) if "workers" in row]


def _begun(task: StageTask) -> Path | None:
    """The longest part of the same training that another trial did and that can be gone on from."""
    longest, found = 0, None
    for place, other in task.store.finished("recovered"):
        settings = task.inputs["settings"]
        wanted = settings.get("stop_after") or settings["steps"]
        steps = other["settings"].get("stop_after", 0)
        same = other == {**task.inputs, "settings": settings | {"stop_after": steps}}
        if same and longest < steps < wanted and task.store.holds(place, STATE):
            longest, found = steps, place
    return found and task.store.bring(found)


def _taught_by(training: TrainConfig, teacher: Path) -> TrainConfig:
    distillation = training.distillation.model_copy(update={"teacher": str(teacher)})
    return training.model_copy(update={"distillation": distillation})


def measure_importance(task: StageTask) -> None:
    model = load_to_measure(task.parent("model") / CHECKPOINT)
    scores = importance_scores(model, task.config.ordered_by, task.config.calibration)
    (task.out / IMPORTANCE).write_text(scores.model_dump_json())


def rank_neurons(task: StageTask) -> None:
    """Scores of the intermediate neurons of the model at this depth, from which every width is cut."""
    model = load_to_measure(task.parent("model") / CHECKPOINT)
    plan = read_plan(task.parent("model")) if task.config.elastic else _depth_plan(task)
    scores = neuron_scores(model, plan, task.config.ordered_by, task.config.calibration)
    arrays: dict[str, Any] = {str(layer): values for layer, values in scores.items()}
    np.savez(task.out / NEURONS, **arrays)


def count_tokens_of_texts(task: StageTask) -> None:
    """How often each token is in the texts that are calibrated on, or in those of every data set."""
    tokenizer, spec = load_text_side(task.parent("model") / CHECKPOINT)
    each = _calibrations(task.config)
    np.save(task.out / TOKENS, sum(count_tokens(tokenizer, spec, one) for one in each))


def fit_axes(task: StageTask) -> None:
    """All axes of the full model's embeddings on those texts: every dimension takes the first of them."""
    model = load_to_measure(task.parent("model") / CHECKPOINT)
    np.save(task.out / AXES, principal_axes(model, _calibrations(task.config)))


def _calibrations(config: TrialConfig) -> list[Calibration]:
    calibration = config.calibration
    names = (calibration.dataset,) if calibration.texts_from else config.dataset_names
    return [calibration.model_copy(update={"dataset": name}) for name in names]


def prune(task: StageTask) -> None:
    plan = _depth_plan(task)
    if ranked := _neurons(task):
        if task.config.elastic is not None:
            ranked = _sorted(ranked)
        with _only_this_trial():
            plan = narrow_plan(plan, task.config.schedule, ranked)
    model = cut(task.parent("model") / CHECKPOINT, plan)
    if "tokens" in task.parents:
        counts, schedule = np.load(task.parent("tokens") / TOKENS), task.config.schedule
        with _only_this_trial():
            plan = with_vocabulary(plan, schedule, model.model.config.vocab_size)
            cut_vocabulary(model, choose_tokens(model.tokenizer, counts, schedule.vocabulary))
    if "axes" in task.parents:
        axes, schedule = np.load(task.parent("axes") / AXES), task.config.schedule
        with _only_this_trial():
            plan = with_dimension(plan, schedule, model.dimension)
        shorten(model, axes, schedule.dimension)
    save_checkpoint(model, task.out / CHECKPOINT)
    write_plan(task.out, plan)


def _depth_plan(task: StageTask) -> Plan:
    with _only_this_trial():
        return depth_plan(task.config.schedule, read_plan(task.parent("model")), _importance(task))


def _importance(task: StageTask) -> ImportanceScores | None:
    if "importance" not in task.parents:
        return None
    return ImportanceScores.model_validate_json((task.parent("importance") / IMPORTANCE).read_text())


def measure_shapes(task: StageTask) -> None:
    """What the elastic model loses, at this trial's depth, if single layers are narrower too."""
    model, plan = load_to_measure(task.parent("model") / CHECKPOINT), _depth_plan(task)
    losses = narrowing_losses(model, plan, _sorted(_neurons(task)), task.config.calibration)
    (task.out / SHAPES).write_text(losses.model_dump_json())


def _sorted(scores: dict[int, NDArray[np.floating]]) -> dict[int, NDArray[np.floating]]:
    """Of an elastic model, whose neurons were sorted by ``scores``."""
    return {layer: np.sort(values)[::-1] for layer, values in scores.items()}


def _neurons(task: StageTask) -> dict[int, NDArray[np.floating]]:
    """Scores by layer; empty where no width is cut."""
    if "neurons" not in task.parents:
        return {}
    with np.load(task.parent("neurons") / NEURONS) as file:
        return {int(layer): file[layer] for layer in file.files}


@contextmanager
def _only_this_trial() -> Iterator[None]:
    """A schedule that its own measurements do not fit is no reason to end the study."""
    try:
        yield
    except InputError as error:
        raise TrialFailure(str(error)) from None


def write_plan(out: Path, plan: Plan) -> None:
    (out / PLAN).write_text(plan.model_dump_json())


def read_plan(model: Path) -> Plan:
    """The plan of a model stage's folder."""
    return Plan.model_validate_json((model / PLAN).read_text())


def plan_of(task: StageTask, model: Path) -> Plan:
    """The same where the model itself need not be on this machine."""
    return Plan.model_validate_json(task.store.small(model, PLAN).read_text())
