"""What a study would do, computed from configurations alone: no weights, no data, no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from effir_ray.compression.planning import (
    ImportanceScores,
    equal_neurons,
    make_plan,
    narrow_plan,
    with_dimension,
    with_vocabulary,
    within,
)
from effir_ray.compression.schedule import Schedule
from effir_ray.config import Config
from effir_ray.data.download import check_name
from effir_ray.errors import InputError
from effir_ray.models import accounting
from effir_ray.models.folder import present_plan
from effir_ray.models.loading import load_config
from effir_ray.models.plan import Plan
from effir_ray.results.conditions import Condition
from effir_ray.search.candidates import Candidate
from effir_ray.search.footprint import ModelSize, study_footprint
from effir_ray.search.priors import suggestions
from effir_ray.search.space import SearchSpace
from effir_ray.search.stage_graph import KeyedStage, Sources
from effir_ray.search.trial_config import StudySettings, TrialConfig
from effir_ray.search.trial_stages import trial_stages
from effir_ray.search.work import Work, study_work
from effir_ray.training.identity import check_names, training_identity

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


Backbones = Mapping[str, "PreTrainedConfig"]
"""Name -> configuration of every backbone of a study."""


def load_backbones(space: SearchSpace) -> dict[str, PreTrainedConfig]:
    return {
        name: load_config(name, first_blocks=space.of(name).first_blocks) for name in space.backbone_names
    }


def depths(backbones: Backbones) -> dict[str, int]:
    """Blocks of each."""
    return {name: config.num_hidden_layers for name, config in backbones.items()}


class TrialPreview(Config):
    """``new_stages`` run for this trial; ``shared_stages`` were already run for one above it.

    ``parameters`` leave the LM head out; ``flops_per_document`` is one text of ``document_max_length``
    tokens.
    """

    trial_id: str
    backbone: str
    schedule: str
    parameters: int
    parameter_ratio: float
    flops_per_document: int
    flops_ratio: float
    new_stages: tuple[str, ...]
    shared_stages: tuple[str, ...]


class StudyPreview(Config):
    """``trials``: those listed, as they begin; ``rungs``: of the trained ones, how many train on from each
    rung of a halving, or of all of them one number. ``stages``: how often each kind of stage runs for the
    listed trials; ``sampled``: trials proposed as it goes, of which ``priors`` are known to be good
    elsewhere; ``shapes``: at most so many more that a solver finds; ``excluded``: combinations of a grid that
    cannot meet the constraints, or of several backbones cannot be built of theirs; ``work``: how much there
    is to compute; ``peak_bytes`` and ``end_bytes``: about what the study takes on disk, at most and in the
    end."""

    study: str
    backbones: tuple[str, ...]
    dataset: str
    sampler: str
    trials: tuple[TrialPreview, ...]
    rungs: tuple[int, ...]
    sampled: int
    shapes: int
    priors: int
    excluded: int
    stages: dict[str, int]
    work: Work
    peak_bytes: int
    end_bytes: int


def dry_run(space: SearchSpace) -> StudyPreview:
    """Check every listed schedule against the backbone and count what it costs.

    Raises InputError for a schedule that cannot be built, naming it.
    """
    _check_sources(space)
    backbones = load_backbones(space)
    _check_widths(space, backbones)
    seen: dict[str, tuple[KeyedStage, TrialConfig, Plan]] = {}
    trials, sizes = [], []
    candidates = allowed_candidates(space, backbones)
    rungs = _rungs(space, candidates)
    further: list[tuple[KeyedStage, TrialConfig, Plan, float]] = []
    for candidate in candidates:
        config, *later = space.rungs(space.trial(candidate))
        backbone, tokens = backbones[config.backbone], config.document_max_length
        plan, full = expected_plan(config, backbones), Plan.full(backbone.num_hidden_layers)
        parameters = accounting.count_parameters(backbone, plan)
        flops = accounting.flops(backbone, plan, tokens)
        stages = trial_stages(config, named_sources(config), "dev")
        trials.append(
            TrialPreview(
                trial_id=config.id,
                backbone=config.backbone,
                schedule=config.name,
                parameters=parameters,
                parameter_ratio=parameters / accounting.count_parameters(backbone, full),
                flops_per_document=flops,
                flops_ratio=flops / accounting.flops(backbone, full, tokens),
                new_stages=tuple(stage.name for stage in stages if stage.key not in seen),
                shared_stages=tuple(stage.name for stage in stages if stage.key in seen),
            )
        )
        sizes.append((config, _model_size(backbone, plan)))
        seen |= {stage.key: (stage, config, plan) for stage in stages if stage.key not in seen}
        further += _further([config, *later], plan, [count / max(1, rungs[0]) for count in rungs])
    names = [stage.name for stage, _, _ in seen.values()]
    fulls = {
        name: _model_size(backbone, Plan.full(backbone.num_hidden_layers))
        for name, backbone in backbones.items()
    }
    disk = study_footprint(space, fulls, sizes)
    return StudyPreview(
        study=space.name,
        backbones=space.backbone_names,
        dataset=space.measured_on,
        sampler=space.sampler,
        trials=tuple(trials),
        rungs=rungs,
        sampled=space.trials,
        shapes=space.added - space.trials,
        priors=len(suggestions(space, depths(backbones))),
        excluded=len(space.listed()) - len(candidates),
        stages={name: names.count(name) for name in dict.fromkeys(names)},
        work=study_work(
            space, backbones, [*((*stage, 1.0) for stage in seen.values()), *further], len(trials)
        ),
        peak_bytes=disk.peak,
        end_bytes=disk.end,
    )


def _rungs(space: SearchSpace, candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """How many trials train at each rung; all that are added as it goes are taken for trained."""
    parts = [len(space.rungs(space.trial(candidate))) for candidate in candidates if candidate.recover]
    counts = [len(parts) + space.added]
    for _ in range(1, max(parts, default=1)):
        counts.append(space.halving.share(counts[-1]))
    return tuple(counts)


def _further(
    parts: Sequence[TrialConfig], plan: Plan, chances: Sequence[float]
) -> Iterator[tuple[KeyedStage, TrialConfig, Plan, float]]:
    """The stages of a trial's later parts, with the chance that they run; of a training only the steps that
    the part before has not done."""
    for before, part, chance in zip(parts, parts[1:], chances[1:], strict=False):
        assert before.recovery is not None and part.recovery is not None
        done = (before.recovery.stop_after or 0) / (part.recovery.stop_after or part.recovery.steps or 1)
        known = {stage.key for stage in trial_stages(before, named_sources(before), "dev")}
        for stage in trial_stages(part, named_sources(part), "dev"):
            if stage.key not in known:
                yield stage, part, plan, chance * (1 - done if stage.name == "recovered" else 1)


def allowed_candidates(space: SearchSpace, backbones: Backbones) -> tuple[Candidate, ...]:
    """``space.listed()`` without the combinations of a grid that cannot meet the constraints. Of several
    backbones, as deep as they are, a combination may fit one and not another: only those that fit stay."""
    always = set(space.always())

    def allowed(candidate: Candidate) -> bool:
        config = space.trial(candidate)
        if len(backbones) > 1:
            try:
                expected_plan(config, backbones)
            except InputError:
                return False
        return may_meet(space.conditions, config, backbones)

    return tuple(candidate for candidate in space.listed() if candidate in always or allowed(candidate))


def may_meet(conditions: Sequence[Condition], config: TrialConfig, backbones: Backbones) -> bool:
    """Whether the trial's size and FLOPs meet ``conditions``; what has to be measured is not asked.

    Raises InputError when the schedule cannot be built.
    """
    backbone = backbones[config.backbone]
    full = Plan.full(backbone.num_hidden_layers)
    known: dict[str, Callable[[Plan], float]] = {
        "parameters": lambda plan: accounting.count_parameters(backbone, plan),
        "parameter_ratio": lambda plan: (
            accounting.count_parameters(backbone, plan) / accounting.count_parameters(backbone, full)
        ),
        "block_parameters": lambda plan: accounting.count_block_parameters(backbone, plan),
        "flops_per_document": lambda plan: accounting.flops(backbone, plan, config.document_max_length),
        "index_bytes": lambda plan: accounting.index_bytes(backbone, plan),
    }
    asked = [condition for condition in conditions if condition.column in known]
    if not asked:
        return True
    plan = expected_plan(config, backbones)
    return all(condition.holds(known[condition.column](plan)) for condition in asked)


def _model_size(backbone: PreTrainedConfig, plan: Plan) -> ModelSize:
    stored = str(backbone.dtype or "float32").removeprefix("torch.")
    return ModelSize(
        parameters=accounting.count_parameters(backbone, plan),
        width=backbone.hidden_size,
        dimensions=accounting.embedding_size(backbone, plan),
        stored=accounting.BYTES_PER_PARAMETER.get(stored, 4),
    )


def _check_sources(space: SearchSpace) -> None:
    """Raise InputError for a name in the space that leads nowhere; what is only a path is not looked for."""
    for dataset in space.dataset_names:
        check_name(dataset)
    if space.calibration_from is not None:
        check_name(space.calibration_from)
    for name in space.backbone_names:
        for field, training in space.of(name).trainings.items():
            try:
                check_names(training)
            except InputError as error:
                raise InputError(f"{field}.{error}") from None


def _check_widths(space: SearchSpace, backbones: Backbones) -> None:
    """Raise InputError for a backbone whose neurons an elastic study cannot sort."""
    narrows = space.strategy == "elastic" and space.least.narrows
    for name, config in backbones.items():
        if narrows and any(layer.neurons is not None for layer in present_plan(config).layers):
            raise InputError(
                f"{name} has narrowed MLPs, and strategy elastic sorts the neurons of whole ones: leave "
                "widths out, or take another strategy"
            )


def expected_plan(config: TrialConfig, backbones: Backbones) -> Plan:
    """A plan of the size the trial will have: which layers and neurons go is not known yet, how many is.

    Of a backbone that is compressed already, what is gone counts as least important, as it does in trials.
    Raises InputError when the schedule cannot be built on this backbone.
    """
    backbone = backbones[config.backbone]
    present = present_plan(backbone)
    scores = ImportanceScores(
        criterion="none",
        attention=tuple(float(layer.attention) for layer in present.layers),
        mlp=tuple(float(layer.mlp) for layer in present.layers),
        block=tuple(float(layer.attention or layer.mlp) for layer in present.layers),
    )
    try:
        _check_names(config.schedule)
        plan = within(make_plan(config.schedule, len(present.layers), scores), present)
        plan = narrow_plan(plan, config.schedule, equal_neurons(backbone, plan))
        plan = with_vocabulary(plan, config.schedule, backbone.vocab_size)
        return with_dimension(plan, config.schedule, accounting.embedding_size(backbone, present))
    except InputError as error:
        hint = (
            "; a schedule is of every backbone unless it names one (backbone:)" if len(backbones) > 1 else ""
        )
        raise InputError(f"schedule {config.name} of {config.backbone}: {error}{hint}") from None


def _check_names(schedule: Schedule) -> None:
    """A counted block may turn out to be one that is named for its attention or MLP as well."""
    drops = {"drop_attention": schedule.drop_attention, "drop_mlp": schedule.drop_mlp}
    named = [name for name, drop in drops.items() if isinstance(drop, tuple) and drop]
    if isinstance(schedule.drop_block, int) and schedule.drop_block and named:
        raise InputError(
            f"drop_block is a count ({schedule.drop_block}) beside layers named in {named[0]}, and which "
            "blocks go is known only after measuring; name the blocks too, or give counts for both"
        )


def named_sources(config: StudySettings) -> Sources:
    """Names in place of fingerprints: enough to see which stages are shared, without reading anything."""
    return Sources(
        backbone=config.backbone,
        dataset=config.dataset,
        datasets={name: name for name in config.datasets},
        calibration=config.calibration_from or config.dataset,
        trainings={
            name: training_identity(training, data=str, model=str)
            for name, training in config.trainings.items()
        },
    )
