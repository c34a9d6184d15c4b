"""The user's folders: a cache of dequantised GGUF copies and content hashes, and the data sets."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from effir_ray.files import write_whole

_WORTH_A_NOTE = 2**20  # bytes; hashing less takes no longer than looking up a note


def cache_folder() -> Path:
    """``$EFFIR_RAY_CACHE``, else ``effir-ray`` in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    own = os.environ.get("EFFIR_RAY_CACHE")
    return Path(own).expanduser() if own else _user_cache()


def file_hash(path: Path) -> str:
    """sha256 of a file's content; remembered on disk while its path, size and time of change stay."""
    status = path.stat()
    if status.st_size < _WORTH_A_NOTE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    note = cache_folder() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
    if note.is_file():
        return note.read_text()
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, digest)
    return digest


def data_folder() -> Path:
    """Where built and downloaded data sets live: ``$EFFIR_RAY_DATA``, else in the user's cache folder."""
    chosen = os.environ.get("EFFIR_RAY_DATA")
    return Path(chosen).expanduser() if chosen else _user_cache() / "datasets"


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "effir-ray"
