"""The one way to files on local disks and in object stores: folders complete or not there at all.

A place is a path or a URI that pyarrow knows (``s3://``, ``gs://``, ``hdfs://``); a URI's options stay at its
end (``s3://bucket/runs?endpoint_override=...``). Keys are never part of one: it is written to rows,
configurations and logs.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from effir_ray.errors import InputError, LostProcess
from effir_ray.files import write_whole
from effir_ray.readers import parse_json

T = TypeVar("T")

_TRIES, _FIRST_TRIES, _LONGEST_PAUSE = 7, 3, 10.0
"""An object store that fails is asked again for about half a minute, one that has not answered yet for two
seconds."""

_WITH_FOLDERS = ("local", "hdfs")  # file systems that need them, and whose files appear before they are whole

_answered: set[tuple[str, str]] = set()
"""Stores that this process has reached."""
_USERINFO = re.compile(
    r"""\b([a-z][a-z0-9+.-]*)://(?!anonymous@)   # which is how public buckets of gs:// are read
    (?: [^/\s?#,;"'<>()\[\]{}:@]*:(?!\d+[/?#])[^\s?#,;"'<>()\[\]{}]*  # key:sec/ret, but no host:port
      | [^/\s?#,;"'<>()\[\]{}]*                                      # a token or a user
    )@""",
    re.IGNORECASE | re.VERBOSE,
)
_TOKENS = re.compile(r"\b(hf_|AKIA|ASIA|gh[opsu]_|AIza)[A-Za-z0-9_-]{16,}")
"""Of Hugging Face, AWS, GitHub and Google, by how they begin."""


def redacted(text: str) -> str:
    """``text`` for messages, without users and keys of URIs, and without tokens of kinds that are known."""
    return _TOKENS.sub(r"\1...", _USERINFO.sub(r"\1://...@", text))


def check_no_credentials(text: str, what: str | None = None) -> None:
    """Raise InputError where ``text``, a place or a whole file, holds a URI's user or key, or a token; the
    message opens with ``what``, by default with ``text`` itself, and repeats none of it."""
    uri, token = _USERINFO.search(text), _TOKENS.search(text)
    if uri:
        found = "credentials in a URI" if what is None else f"credentials in a URI ({uri[1]}://...@...)"
    elif token:
        found = f"a token ({token[1]}...)"
    else:
        return
    raise InputError(
        f"{redacted(text) if what is None else what} holds {found}, which would be written to rows, logs and "
        "job descriptions; leave them out, and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
        "AWS_ENDPOINT_URL, HF_TOKEN and their like in the environment of each machine, or use the usual "
        "files (~/.aws)"
    )


def is_uri(place: str | Path) -> bool:
    """Whether ``place`` is a URI, not a path."""
    return "://" in str(place)


def locate(place: str | Path) -> tuple[Any, str]:
    """pyarrow's file system of ``place``, and the path in it.

    Raises InputError for an unusable URI, and for one that holds credentials.
    """
    from pyarrow import fs  # commands that only ask ``is_uri`` start without it

    if is_uri(place):
        check_no_credentials(str(place))
    else:
        return fs.LocalFileSystem(), str(Path(place).expanduser().absolute())
    try:
        system, path = fs.FileSystem.from_uri(str(place))
    except (OSError, ValueError) as error:
        raise InputError(f"{place} cannot be used: {_reason(error)}") from error
    return system, path.rstrip("/")


@contextmanager
def reached(place: str | Path) -> Iterator[None]:
    """An object store that does not answer, or has no such bucket, is an InputError of one line."""
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        if not is_uri(place):
            raise
        raise InputError(f"{place} cannot be used: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as its file system lists it; ``changed`` in ns."""

    place: str
    size: int
    changed: int


def list_files(place: str | Path) -> list[StoredFile]:
    """The file at ``place``, or the files directly in the folder there, by name.

    Raises InputError where there is nothing, or nothing that can be reached.
    """
    from pyarrow import fs

    system, path = locate(place)
    try:
        whole = system.get_file_info(path)
        if whole.type == fs.FileType.Unknown:
            raise InputError(f"{place} cannot be read: it is a pipe, a socket or a device")
        folder = whole.type != fs.FileType.File
        found = system.get_file_info(fs.FileSelector(path)) if folder else [whole]
    except OSError as error:
        raise InputError(f"{place} cannot be read: {_reason(error)}") from None
    return [
        StoredFile(
            place=join(str(place), info.base_name) if folder else str(place),
            size=info.size,
            changed=info.mtime_ns,
        )
        for info in sorted(found, key=lambda info: info.base_name)
        if info.type == fs.FileType.File
    ]


def listing(folder: str) -> list[tuple[str, int, int]]:
    """(path in the folder, bytes, when it was written in ns) of every file below a URI, by path. Raises
    InputError where there is none, or nothing can be reached."""
    from pyarrow import fs

    system, path = locate(folder)
    with reached(folder):
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    files = [info for info in found if info.type == fs.FileType.File]
    if not files:
        raise InputError(f"{folder}: no such folder, or nothing in it")
    inside = len(path) + 1
    return sorted((info.path[inside:], info.size, info.mtime_ns) for info in files)


def name_of(place: str) -> str:
    """The last part of a path or URI, without a URI's options."""
    return place.partition("?")[0].rstrip("/").rpartition("/")[2] if is_uri(place) else Path(place).name


def open_file(place: str | Path) -> Any:
    """The file at ``place`` for reading at any position, a context manager."""
    system, path = locate(place)
    with reached(place):
        return system.open_input_file(path)


def join(base: str, name: str) -> str:
    """``base/name``, as a place."""
    if not is_uri(base):
        return f"{base.rstrip('/')}/{name}"
    place, mark, options = base.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def check(base: str) -> None:
    """Raise InputError where no files can be written to ``base``: workers would fail much later and at
    length.
    """
    if not is_uri(base):
        return
    system, path = locate(base)
    probe = f"{path}/.effir-ray-{uuid.uuid4().hex}"
    with reached(base):
        system.create_dir(path, recursive=True)
        system.open_output_stream(probe).close()
        system.delete_file(probe)


def upload(target: str, write: Callable[[Path], object], aside: Path) -> None:
    """Let ``write`` make a folder at ``target``, for a URI in a new folder ``aside``, which goes again."""
    if not is_uri(target):
        write(Path(target))
        return
    from pyarrow import fs

    system, path = locate(target)
    aside.mkdir(mode=0o700, parents=True)
    try:
        folder = aside / "folder"
        write(folder)

        def attempt() -> None:
            system.create_dir(path, recursive=True)
            fs.copy_files(str(folder), path, destination_filesystem=system)

        steadily(target, attempt)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def fetch(source: str, folder: Path) -> None:
    """Move (from a path) or copy (from a URI) the folder at ``source`` to ``folder``, replacing that."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / "new"
        if is_uri(source):
            _copy(source, new)
        else:
            shutil.move(source, new)
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)


def write_json(target: str, value: Any) -> None:
    """One small file; the folder above is made where it is missing."""
    text = json.dumps(value)
    if not is_uri(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(target), text)
        return
    put(target, text.encode())


# -- object stores alone, whose failures of a moment nobody sees ---------------------------------------
#
# Tried again for half a minute. Then a store that answered before is lost (LostProcess: the same command goes
# on when it is back), and one that never did was given wrongly (InputError).


def put(target: str, content: Any) -> None:
    """The object at the URI ``target``: whole or not there. ``content``: bytes, or anything like them."""
    system, path = locate(target)
    folders = system.type_name in _WITH_FOLDERS
    aside = f"{path}.tmp-{uuid.uuid4().hex[:8]}" if folders else path

    def attempt() -> None:
        if folders:
            system.create_dir(path.rpartition("/")[0], recursive=True)
        with system.open_output_stream(aside) as stream:
            stream.write(content)
        if folders:
            system.move(aside, path)

    steadily(target, attempt)


def get(source: str) -> bytes | None:
    """What ``put`` wrote; None where there is no object."""
    system, path = locate(source)

    def attempt() -> bytes | None:
        try:
            with system.open_input_stream(path) as stream:
                content: bytes = stream.read()
        except FileNotFoundError:
            return None
        return content

    return steadily(source, attempt)


def entries(folder: str) -> dict[str, int]:
    """Names directly in the folder at a URI, and when each was written in ns (0 for folders)."""
    from pyarrow import fs

    system, path = locate(folder)

    def attempt() -> dict[str, int]:
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return {info.base_name: info.mtime_ns or 0 for info in found}

    return steadily(folder, attempt)


def there(place: str) -> bool:
    """Whether an object is at the URI."""
    from pyarrow import fs

    system, path = locate(place)
    return steadily(place, lambda: bool(system.get_file_info(path).type == fs.FileType.File))


def send(source: Path, target: str) -> None:
    """Copy the file or folder ``source`` to a URI; what links lead to is copied too."""
    from pyarrow import fs

    system, path = locate(target)

    def attempt() -> None:
        if not source.is_dir():
            system.create_dir(path.rpartition("/")[0], recursive=True)
        fs.copy_files(str(source), path, destination_filesystem=system)

    steadily(target, attempt)


def bring(source: str, target: Path) -> None:
    """Copy the folder at a URI to ``target``, which is complete or not there; one that is there stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        new = Path(scratch) / "new"
        _copy(source, new)
        if not target.exists():
            new.rename(target)


def bytes_at(folder: str) -> int:
    """Of all objects below a URI."""
    from pyarrow import fs

    system, path = locate(folder)
    selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
    return steadily(folder, lambda: sum(info.size or 0 for info in system.get_file_info(selector)))


def steadily(place: str, attempt: Callable[[], T]) -> T:
    """``attempt()``, again where it fails."""
    store, failures = _store_of(place), 0
    while True:
        try:
            found = attempt()
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            failures += 1
            if store not in _answered and failures >= _FIRST_TRIES:
                raise InputError(f"{place} cannot be used: {_reason(error)}") from error
            if failures >= _TRIES:
                raise LostProcess(f"{place} does not answer any more: {_reason(error)}") from error
            time.sleep(min(0.25 * 2 ** (failures - 1), _LONGEST_PAUSE))
        else:
            _answered.add(store)
            return found


def _store_of(place: str) -> tuple[str, str]:
    """Bucket and options of a URI."""
    base, _, options = place.partition("?")
    return "/".join(base.split("/", 3)[:3]), options


def read_json(source: str) -> Any:
    """What ``write_json`` wrote; None where there is no file."""
    if is_uri(source):
        content = get(source)
        return None if content is None else parse_json(content, source)
    if not exists(source):
        return None
    with open_file(source) as stream:
        return parse_json(stream.read(), source)


def exists(source: str) -> bool:
    found: bool = _type(source).name != "NotFound"
    return found


def remove(source: str) -> None:
    """Delete the folder (at a URI also the file) at ``source``; nothing happens when there is none."""
    if not is_uri(source):
        shutil.rmtree(source, ignore_errors=True)
        return
    system, path = locate(source)
    kind = _type(source).name
    if kind != "NotFound":

        def attempt() -> None:
            try:
                (system.delete_file if kind == "File" else system.delete_dir)(path)
            except FileNotFoundError:  # by the attempt that failed, or by another process
                return

        steadily(source, attempt)


def _type(source: str) -> Any:
    """pyarrow's ``FileType`` of what is there."""
    system, path = locate(source)
    if is_uri(source):
        return steadily(source, lambda: system.get_file_info(path).type)
    return system.get_file_info(path).type


def _copy(source: str, folder: Path) -> None:
    from pyarrow import fs

    system, path = locate(source)

    def attempt() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        fs.copy_files(path, str(folder), source_filesystem=system)

    steadily(source, attempt)
