"""Search spaces: what a YAML may say, and what it becomes."""

from pathlib import Path

import pytest

from effir_ray.config import load_yaml
from effir_ray.errors import InputError
from effir_ray.search.candidates import Candidate
from effir_ray.search.space import SearchSpace
from effir_ray.search.trial_config import TrialConfig
from effir_ray.training.config import TrainConfig
from tests.helpers.search_examples import small_space

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
TRAINING = {"steps": 2, "batch_size": 4, "lora": None}


def write(folder: Path, text: str) -> Path:
    file = folder / "space.yaml"
    one = "" if text.startswith("backbones: [random:llama") else "backbone: random:llama\n"
    file.write_text(f"name: s\n{one}dataset: stdlib\n{text}")
    return file


@pytest.mark.parametrize("file", SPACES, ids=lambda file: file.stem)
def test_shipped_spaces_are_valid_and_begin_with_the_full_model(file: Path) -> None:
    space = load_yaml(file, SearchSpace)
    assert space.name == file.stem
    first = space.backbone_names[0] if len(space.backbone_names) > 1 else None
    assert space.listed()[0] == Candidate(backbone=first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedules:\n  - {drop_mpl: 2}\n", r"space.yaml:5: unknown key .*; did you mean 'drop_mlp'"),
        ("parameters: {drop_mpl: [1, 2]}\n", r"space.yaml:4: unknown key .*; did you mean 'drop_mlp'"),
        ("parameters: {drop_mlp: [-1]}\n", "drop_mlp: -1 is not possible"),
        ("parameters: {width_reduction: {low: 0.5, high: 0.1}}\n", "low not above high"),
        ("parameters: {drop_mlp: {low: 0.0, high: 4.0}}\ntrials: 3\n", "drop_mlp .* whole numbers"),
        (
            "parameters: {drop_block: {low: 0, high: 4, step: 0.5}}\ntrials: 3\n",
            "drop_block .* whole numbers",
        ),
        ("parameters: {drop_mlp: [1, 2]}\n", "no trials for sampler tpe: set 'trials', or 'sampler: grid'"),
        ("timing: {documents: 0}\n", "timing.documents"),
        ("calibration_from: s3://key:hid/den@bucket/x\n", r"yaml:4: calibration_from: it holds credentials"),
        (
            "priors: ['https://hidden@host/x']\ntrials: 1\n",
            r"priors.*credentials .*\(found 'https://\.\.\.@host",
        ),
        ("trials: 3\n", "gives nothing to vary"),
        ("objectives: [ndcg, parameters]\n", "space.yaml:4: objectives: objective 'ndcg' is not measured"),
        ("objectives: [parameters, parameters]\n", "objectives: 'parameters' is named twice"),
        ("objectives: []\n", "objectives"),
        ("constraints: [small]\n", "space.yaml:4: constraints: cannot read 'small'"),
        ("constraints: [params <= 1e8]\n", "constraints: 'params' is not measured"),
        ("budget: {hours: 0}\n", "budget.hours"),
        ("budget: {hours: .inf}\n", "budget.hours"),
        ("budget: {minutes: 3}\n", "unknown key"),
        ("sampler: grid\ntrials: 3\nparameters: {drop_mlp: [1]}\n", "leave 'trials' out"),
        ("sampler: grid\nparameters: {width_reduction: {low: 0.0, high: 0.5}}\n", "needs choices or a step"),
        ("schedules: [{drop_mlp: 1, recover: true}]\n", "'recovery' .* is missing"),
        ("dev: {queries: 3}\n", "given together"),
        ("base_training: {model: random:llama}\n", "base_training trains the study's own models"),
        ("base_training: {split: dev}\n", "base_training: split is 'dev': dev and test queries are held out"),
        ("recovery: {split: test}\n", "recovery: split is 'test': dev and test queries are held out"),
        ("recovery: {held_out: other}\n", "recovery holds out the study's data: leave 'held_out' out"),
        (
            "base_training: {distillation: {teacher: base, embedding: 1}}\n",
            "base_training makes the study's full model, which is 'base': name another",
        ),
        ("base_training: {stepz: 3}\n", "did you mean 'steps'"),
        (
            "recovery: {prompts: {query: a}}\n",
            "recovery trains with the study's prompts: leave",
        ),
        ("prompts: {questions: a}\n", "unknown key"),
        ("datasets: [other, stdlib]\n", "give 'dataset' or 'datasets', not both"),
        ("datasets: [stdlib, stdlib]\n", "datasets: 'stdlib' is named twice"),
        ("datasets: [stdlib, 'a, b']\n", "'a, b': a name in a list of data sets has no comma"),
        ("datasets: 3\n", "datasets: "),
        ("priors: [published]\n", "'priors' are the first of the sampler's trials"),
        ("sampler: grid\nparameters: {drop_mlp: [1]}\npriors: [published]\n", "leave 'priors' out"),
        ("seeds: [1, 2]\nseed: 2\n", "give 'seed' or 'seeds', not both"),
        ("seeds: [1, 1]\n", "seeds: '1' is named twice"),
        ("seeds: [1, -1]\n", "seeds"),
        ("backbones: [random:bert, random:llama]\n", "give 'backbone' or 'backbones', not both"),
        ("backbones: [random:llama, random:llama]\n", "'random:llama' is named twice"),
        ("backbones: [random:llama, {backbone: random:bert, steps: 3}]\n", "unknown key"),
        ("backbones: [random:llama, {first_blocks: 3}]\n", "backbones"),
        (
            "backbones: [random:llama, random:bert]\nschedules: [{drop_mlp: 1, backbone: minilm}]\n",
            "schedule 1M is of backbone 'minilm'; the study's are random:llama, random:bert",
        ),
        (
            "backbones: [random:llama, random:bert]\nobjectives: [ndcg_at_10, document_speedup]\n",
            "objective document_speedup compares a model with its own full one",
        ),
        (
            "backbones: [random:llama, {backbone: random:bert, recovery: {steps: 2}}]\n"
            "schedules: [{drop_mlp: 1, recover: true}]\n",
            "'recovery' .* is missing",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_yaml(write(tmp_path, text), SearchSpace)


SEVERAL = {
    "backbones": ["random:llama", {"backbone": "random:bert", "first_blocks": 2, "recovery": {"steps": 3}}],
    "recovery": TRAINING,
    "seed": 7,
}


def test_all_of_several_data_sets_are_held_out_and_the_first_is_learnt_from() -> None:
    recovery = {"steps": 2}
    space = small_space(
        dataset="stdlib",
        datasets=["stdlib", "other"],
        recovery=recovery,
        backbones=["random:llama", {"backbone": "random:bert", "recovery": {"steps": 3}}],
    )
    for name in space.backbone_names:
        training = space.of(name).recovery
        assert training is not None
        assert (training.dataset, training.held_out) == ("stdlib", ("stdlib", "other"))
    config = space.trial(Candidate(recover=True, backbone="random:llama"))
    assert TrialConfig.read(config.model_dump_json(), "here") == config
    assert config.measured_on == "mean of stdlib, other" and config.on("other").measured_on == "other"
    assert config.id != small_space(recovery=recovery).trial(Candidate(recover=True)).id


def test_another_seed_is_that_of_trainings_too_unless_they_have_their_own() -> None:
    space = small_space(seeds=[3, 4], base_training={"steps": 2, "seed": 9}, recovery={"steps": 2})
    config = space.trial(Candidate(recover=True))
    assert config.recovery is not None and config.base_training is not None
    assert (config.seed, config.recovery.seed, config.base_training.seed) == (3, 3, 9)
    other = config.with_seed(4)
    assert other.recovery is not None and other.base_training is not None
    assert (other.seed, other.recovery.seed, other.base_training.seed) == (4, 4, 9)
    alone = small_space(seed=4, base_training={"steps": 2, "seed": 9}, recovery={"steps": 2})
    assert other == alone.trial(Candidate(recover=True))


def test_a_list_of_one_data_set_is_that_data_set() -> None:
    one, single = (small_space(**given) for given in ({"datasets": ["stdlib"]}, {"dataset": "stdlib"}))
    assert one == single and "datasets" not in one.model_dump()


def test_each_of_several_backbones_has_its_own_settings_and_the_studys() -> None:
    space = small_space(**SEVERAL, schedules=[{"drop_mlp": 1, "recover": True}])
    trials = [space.trial(candidate) for candidate in space.listed()]
    assert [(trial.backbone, trial.name) for trial in trials] == [
        ("random:llama", "full"),
        ("random:bert", "full"),
        ("random:llama", "1M+ft"),
        ("random:bert", "1M+ft"),
    ]
    llama, bert = (trial.recovery for trial in trials[2:])
    assert (llama.steps, llama.batch_size, bert.steps) == (2, 4, 3)
    assert (bert.dataset, bert.held_out, bert.seed) == ("stdlib", "stdlib", 7)
    assert [trial.first_blocks for trial in trials] == [None, 2, None, 2]
    assert space.objectives == ("ndcg_at_10", "parameters", "document_ms")
    assert SearchSpace.model_validate_json(space.model_dump_json()) == space


def test_one_backbone_in_a_list_is_that_backbone() -> None:
    space = small_space(backbones=[{"backbone": "random:llama", "first_blocks": 2}])
    (full,) = space.listed()
    assert full == Candidate() and space.trial(full).first_blocks == 2
    assert space.objectives == small_space().objectives


def test_a_trial_of_one_of_several_backbones_is_that_of_a_study_of_it_alone() -> None:
    several = small_space(backbones=["random:llama", "random:bert"])
    candidate = Candidate(drop_mlp=2, backbone="random:bert")
    alone = small_space(backbone="random:bert")
    assert several.trial(candidate) == alone.trial(Candidate(drop_mlp=2))


def test_training_takes_data_and_seed_of_the_study_unless_it_names_its_own() -> None:
    space = small_space(seed=7, base_training=TRAINING, recovery=TRAINING | {"dataset": "other", "seed": 1})
    assert (space.base_training.dataset, space.base_training.seed) == ("stdlib", 7)
    assert (space.recovery.dataset, space.recovery.seed) == ("other", 1)


def test_training_settings_given_as_objects_hold_the_studys_data_set_out_too() -> None:
    settings = TrainConfig(dataset="pairs.jsonl")
    space = small_space(base_training=settings, recovery=TRAINING | {"dataset": "pairs.jsonl"})
    trial = space.trial(Candidate(recover=True))
    for training in (space.base_training, space.recovery, trial.base_training, trial.recovery):
        assert (training.dataset, training.held_out) == ("pairs.jsonl", "stdlib")
    with pytest.raises(ValueError, match="split is 'dev': dev and test queries are held out"):
        small_space(recovery=settings.model_copy(update={"split": "dev"}))


def test_settings_that_change_nothing_do_not_make_another_trial() -> None:
    space = small_space()
    plain = space.trial(Candidate(drop_mlp=(1, 2)))
    assert space.trial(Candidate(drop_mlp=(1, 2), width_method="random", importance="pooled")).id == plain.id
    assert space.trial(Candidate(drop_mlp=2, importance="pooled")).id != space.trial(Candidate(drop_mlp=2)).id
    twice = small_space(schedules=[{}, {"drop_mlp": 1}, {"drop_mlp": 1, "width_method": "random"}])
    assert [candidate.name for candidate in twice.listed()] == ["full", "1M"]


def test_grid_lists_every_combination_once() -> None:
    axes = {"drop_mlp": {"low": 0, "high": 2}, "width_reduction": {"low": 0.0, "high": 0.2, "step": 0.1}}
    space = small_space(sampler="grid", parameters=axes)
    assert [c.name for c in space.listed()] == [
        *("full", "w10", "w20"),
        *("1M", "1M-w10", "1M-w20"),
        *("2M", "2M-w10", "2M-w20"),
    ]


def test_layer_lists_are_choices() -> None:
    space = small_space(sampler="grid", parameters={"drop_mlp": [[1, 3], [2], 1]})
    assert [c.name for c in space.listed()] == ["full", "M[1,3]", "M[2]", "1M"]


def test_a_trial_survives_json_and_only_trained_ones_carry_recovery() -> None:
    space = small_space(recovery=TRAINING)
    trained = space.trial(Candidate(drop_mlp=1, recover=True))
    again = TrialConfig.model_validate_json(trained.model_dump_json())
    assert again == trained
    assert again.id == trained.id
    assert trained.name == "1M+ft"
    assert space.trial(Candidate(drop_mlp=1)).recovery is None
    assert trained.full() == space.trial(Candidate())
