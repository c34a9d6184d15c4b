"""Folders on local disks and on S3-style stores, complete or not there at all."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effir_ray.errors import InputError


def join(base: str, name: str) -> str:
    """``base/name``; a URI's options (``s3://bucket/runs?endpoint_override=...``) stay at its end."""
    if "://" not in base:
        return f"{base.rstrip('/')}/{name}"
    place, mark, options = base.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def check(base: str) -> None:
    """Raise InputError where no files can be written to ``base``: workers would fail much later and at
    length.
    """
    if "://" not in base:
        return
    probe = join(base, f".effir-ray-{uuid.uuid4().hex}")
    try:
        write_json(probe, {})
        remove(probe)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{base} cannot be written to: {reason}") from error


def upload(target: str, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a folder at ``target``, a path or a URI (``s3://bucket/key``)."""
    if "://" not in target:
        write(Path(target))
        return
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(target)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "folder"
        write(folder)
        filesystem.create_dir(path, recursive=True)
        fs.copy_files(str(folder), path, destination_filesystem=filesystem)


def fetch(source: str, folder: Path) -> None:
    """Move (from a path) or copy (from a URI) the folder at ``source`` to ``folder``, replacing that."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        if "://" in source:
            _copy(source, new)
        else:
            shutil.move(source, new)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)


def write_json(target: str, value: Any) -> None:
    """One small file at a path or URI; the folder above is made where it is missing."""
    text = json.dumps(value)
    if "://" not in target:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text, encoding="utf-8")
        return
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(target)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(text.encode())


def read_json(source: str) -> Any:
    """What ``write_json`` wrote; None where there is no file."""
    if not exists(source):
        return None
    if "://" not in source:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(source)
    with filesystem.open_input_stream(path) as stream:
        return json.loads(stream.read())


def exists(source: str) -> bool:
    if "://" not in source:
        return Path(source).exists()
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(source)
    kind: Any = filesystem.get_file_info(path).type
    return bool(kind != fs.FileType.NotFound)


def remove(source: str) -> None:
    """Delete the folder (at a URI also the file) at ``source``; nothing happens when there is none."""
    if "://" not in source:
        shutil.rmtree(source, ignore_errors=True)
    elif exists(source):
        from pyarrow import fs

        filesystem, path = fs.FileSystem.from_uri(source)
        kind: Any = filesystem.get_file_info(path).type
        (filesystem.delete_file if kind == fs.FileType.File else filesystem.delete_dir)(path)


def _copy(source: str, folder: Path) -> None:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(source)
    folder.mkdir()
    fs.copy_files(path, str(folder), source_filesystem=filesystem)
