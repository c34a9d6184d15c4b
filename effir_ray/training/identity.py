"""What a training run is made of, by content: equal identities train equal weights.

One description for whoever must know whether a result may be used again: a run that is resumed, and the
stages of a search.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from effir_ray.data import download
from effir_ray.data.pair_stream import source_files, source_fingerprint
from effir_ray.errors import InputError
from effir_ray.models import names
from effir_ray.models.names import backbone_fingerprint, model_reads
from effir_ray.training.config import STUDY_TEACHER, TrainConfig

# None of these reaches the weights: where checkpoints lie, how many, how often a run starts again.
_WITHOUT_EFFECT = {"storage_path", "checkpoint_every", "keep_checkpoints", "max_failures"}
_UNTRAINED_MINERS = ("given", "bm25")  # values of ``negatives`` that name no model


def training_identity(
    config: TrainConfig,
    *,
    data: Callable[[str], str] = source_fingerprint,
    model: Callable[[str], str] = backbone_fingerprint,
) -> dict[str, Any]:
    """{"settings": all that bear on the result, "contents": role -> content of what is read}; JSON values.

    Names of data sets and models are not in it: the same content under another path is the same training,
    and another content under the same path is another one. The model that is trained is the caller's to
    add, and so is the hardware. Settings that change sums by rounding alone (workers, threads, passes, ZeRO
    stages) count: results are repeated bit by bit.

    ``data`` and ``model``: what a name's content is; ``str`` leaves the names, where nothing may be read.
    A study's own full model (``STUDY_TEACHER``) stays a name here: the stage that learns from it has it among
    its parents. Raises InputError for what is not there.
    """
    read = {role: (data, name) for role, name in _data_read(config).items()}
    read |= {role: (model, name) for role, name in _models_read(config).items()}
    settings = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    for role in read:
        _clear(settings, role.split("."))
    return {
        "settings": settings,
        "contents": {role: content(name) for role, (content, name) in read.items()},
    }


def training_reads(config: TrainConfig) -> dict[str, Callable[[], dict[str, Path]]]:
    """What a training reads besides its model -> its files, wherever that is called."""
    reads: dict[str, Callable[[], dict[str, Path]]] = {}
    for name in _data_read(config).values():
        reads[f"data '{name}'"] = partial(source_files, name)
    for name in _models_read(config).values():
        reads |= model_reads(name)
    return reads


def check_names(config: TrainConfig) -> None:
    """Raise InputError for a data set, miner or teacher whose name leads nowhere, naming the field; fetches
    and reads nothing."""
    roles = [(role, name, download.check_name) for role, name in _data_read(config).items()]
    roles += [(role, name, names.check_name) for role, name in _models_read(config).items()]
    for role, name, check in roles:
        try:
            check(name)
        except InputError as error:
            raise InputError(f"{role}: {error}") from None


def _data_read(config: TrainConfig) -> dict[str, str]:
    """Field -> name of a data set or of files of pairs."""
    read = {"dataset": config.dataset}
    if isinstance(config.held_out, str):
        read["held_out"] = config.held_out
    else:
        read |= {f"held_out.{number}": name for number, name in enumerate(config.held_out_names)}
    if config.dev is not None:
        read["dev.dataset"] = config.dev.dataset or config.dataset
    return read


def _models_read(config: TrainConfig) -> dict[str, str]:
    """Field -> name of a model that is not trained itself."""
    read = {}
    if config.negatives not in _UNTRAINED_MINERS and config.hard_negatives:
        read["negatives"] = config.negatives
    if config.distillation.teacher not in (None, STUDY_TEACHER):
        read["distillation.teacher"] = config.distillation.teacher
    return read


def _clear(settings: Any, field: list[str]) -> None:
    """A name gives way to the content that stands beside the settings."""
    place, *rest = [int(field[0]) if isinstance(settings, list) else field[0], *field[1:]]
    if rest:
        _clear(settings[place], field[1:])
    else:
        settings[place] = "by content"
