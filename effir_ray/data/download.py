"""BEIR data sets by name: from BEIR's server (resuming), checked against its MD5, unpacked safely."""

from __future__ import annotations

import difflib
import hashlib
import http.client
import lzma
import os
import shutil
import stat
import struct
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from effir_ray.caches import data_folder
from effir_ray.data.datasets import official_name
from effir_ray.data.stdlib_corpus import build_stdlib
from effir_ray.errors import InputError, is_disk_full
from effir_ray.leases import LEASES, aloud, lease
from effir_ray.progress import Progress, progress
from effir_ray.readers import quoted

BEIR_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"
_ATTEMPTS = 5  # connections opened one after the other, each going on where the last one broke
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20

_DAMAGED = (
    NotImplementedError,  # an unknown method of compression
    RuntimeError,  # encrypted
    EOFError,
    OSError,  # bz2's, and places outside the file or names that no file can have
    ValueError,
    lzma.LZMAError,
    struct.error,
    zlib.error,
)
"""What ``zipfile`` raises for a damaged archive, beside its own."""


@dataclass(frozen=True)
class BeirSet:
    """A data set of BEIR (Thakur et al. 2021, table 1) and the MD5 that BEIR publishes for its archive."""

    name: str
    md5: str
    documents: int
    test_queries: int
    in_paper: bool = True  # one of the 13 sets of EffiR's table 1
    parts: tuple[str, ...] = ()


_FORUMS = (
    *("android", "english", "gaming", "gis", "mathematica", "physics"),
    *("programmers", "stats", "tex", "unix", "webmasters", "wordpress"),
)

BEIR_SETS = {
    dataset.name: dataset
    for dataset in (
        BeirSet("arguana", "8ad3e3c2a5867cdced806d6503f29b99", 8_674, 1_406),
        BeirSet("climate-fever", "8b66f0a9126c521bae2bde127b4dc99d", 5_416_593, 1_535),
        BeirSet("dbpedia-entity", "c2a39eb420a3164af735795df012ac2c", 4_635_922, 400),
        BeirSet("fever", "88591ef8eb2913126d0c93ecbde6285f", 5_416_568, 6_666),
        BeirSet("fiqa", "17918ed23cd04fb15047f73e6c3bd9d9", 57_638, 648),
        BeirSet("hotpotqa", "f412724f78b0d91183a0e86805e16114", 5_233_329, 7_405),
        BeirSet("nfcorpus", "a89dba18a62ef92f7d323ec890a0d38d", 3_633, 323),
        BeirSet("nq", "d4d3d2e48787a744b6f6e691ff534307", 2_681_468, 3_452),
        BeirSet("quora", "18fb154900ba42a600f84b839c173167", 522_931, 10_000),
        BeirSet("scidocs", "38121350fc3a4d2f48850f6aff52e4a9", 25_657, 1_000),
        BeirSet("scifact", "5f7d1de60b170fc8027bb7898e2efca1", 5_183, 300),
        BeirSet("trec-covid", "ce62140cb23feb9becf6270d0d1fe6d1", 171_332, 50),
        BeirSet("webis-touche2020", "6e29ac6c57e2d227fb57501872cac45f", 382_545, 49),
        BeirSet("cqadupstack", "4e41456d7df8ee7760a7f866133bda78", 457_199, 13_145, False, _FORUMS),
        BeirSet("msmarco", "444067daf65d982533ea17ebd59501e4", 8_841_823, 43, False),
    )
}


@dataclass(frozen=True)
class Listing:
    """One line of ``effir-ray data list``."""

    name: str
    documents: int | None  # None: known once it is built
    test_queries: int | None
    in_paper: bool
    folder: Path | None  # None: not here yet


def list_datasets() -> list[Listing]:
    """Every data set that has a name (``stdlib``, BEIR's, CQADupStack's forums) and where it is."""
    root = data_folder()
    built = sorted(path for path in root.glob("stdlib-*") if path.is_dir())
    listings = [Listing("stdlib", None, None, False, built[-1] if built else None)]
    for known in BEIR_SETS.values():
        here = root / known.name
        listings.append(
            Listing(
                known.name,
                known.documents,
                known.test_queries,
                known.in_paper,
                here if here.is_dir() else None,
            )
        )
        for part in known.parts:
            folder = here / part if (here / part).is_dir() else None
            listings.append(Listing(f"{known.name}/{part}", None, None, known.in_paper, folder))
    return listings


def check_name(name: str) -> None:
    """Raise InputError for a bare name of a data set that there is none of, neither here nor to be had. Paths
    are not looked at: they may be those of another machine."""
    places = (Path(name).expanduser(), data_folder() / name)
    known = {"stdlib", *BEIR_SETS}
    if "/" in name or official_name(name) in known or any(place.exists() for place in places):
        return
    near = difflib.get_close_matches(name, known, n=1)
    raise InputError(
        f"data set '{name}': no such folder or file, nothing of that name in {data_folder()}, none to get; "
        "see: effir-ray data list" + (f"; did you mean '{near[0]}'?" if near else "")
    )


def get(name: str, *, base_url: str | None = None) -> Path:
    """The folder of a named data set, downloaded first if it is not here; ``stdlib`` is built.

    ``cqadupstack/android`` fetches all of CQADupStack (one archive) and gives that forum. ``base_url`` (or
    ``$EFFIR_RAY_BEIR_URL``) is a mirror that holds the same archives. Raises InputError for an unknown name,
    without a connection, for a wrong checksum or an archive that reaches outside its folder, without disk
    space.
    """
    if name == "stdlib":
        return build_stdlib()
    whole, _, part = official_name(name).partition("/")
    known = BEIR_SETS.get(whole)
    if known is None or (part and part not in known.parts):
        raise InputError(f"unknown data set '{name}'; known: {', '.join(['stdlib', *BEIR_SETS])}")
    root = data_folder()
    folder = root / known.name
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with lease(root / LEASES, known.name, waiting=aloud(f"data set {known.name}")) as mine:
            if not folder.is_dir():
                url = base_url or os.environ.get("EFFIR_RAY_BEIR_URL") or BEIR_URL
                archive = _download(f"{url.rstrip('/')}/{known.name}.zip", root, known)
                mine.check()
                _unpack(archive, folder)
                archive.unlink()
    return folder / part if part else folder


def _download(url: str, root: Path, known: BeirSet) -> Path:
    """The checked archive. What arrived stays in a ``.partial`` file, from which the next call goes on."""
    if not url.lower().startswith(("http://", "https://")):  # urllib opens files of this machine too
        raise InputError(f"{quoted(url)} is no address to download from; expected http:// or https://")
    partial = root / f"{known.name}.zip.partial"
    problem: Exception | None = None
    with progress(f"Downloading {known.name}", unit="MiB") as bar:
        for _ in range(_ATTEMPTS):
            before = _size(partial)
            try:
                if complete := _fetch_rest(url, partial, bar):
                    break
            except urllib.error.HTTPError as error:
                raise InputError(f"{url}: the server answers {error.code} {error.reason}") from None
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                problem, complete = error, False
            except ValueError as error:
                raise InputError(f"{quoted(url)} is no address to download from: {error}") from None
            if _size(partial) == before:
                break  # nothing came: trying again at once would not help
    if not complete:
        reason = getattr(problem, "reason", None) or problem or "the connection was closed early"
        raise InputError(
            f"{url}: {reason}; {_size(partial) >> 20} MiB are kept and the same command goes on from there. "
            f"Without a network copy the unpacked BEIR folder to {root / known.name}"
        )
    with partial.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != known.md5:
        partial.unlink()
        raise InputError(
            f"{url}: MD5 is {found}; BEIR publishes {known.md5}; the file was removed, try again"
        )
    return partial


def _fetch_rest(url: str, partial: Path, bar: Progress) -> bool:
    """Append what ``partial`` lacks of ``url`` by a range request; True when it has its full length."""
    start = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return True  # nothing is missing; the checksum will tell whether it is the right file
        raise
    with response:
        resumed = response.status == 206  # 200: the server sends everything again
        length = response.headers.get("Content-Length")
        if length is not None and not (length.isascii() and length.isdigit() and len(length) < 16):
            raise InputError(f"{url}: the server says Content-Length: {quoted(length)}; expected a number")
        expected = None if length is None else int(length) + (start if resumed else 0)
        _check_space(partial.parent, int(length or 0), url)
        bar.total = None if expected is None else expected >> 20
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.advance(len(chunk) >> 20)
    return expected is None or _size(partial) == expected


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack ``archive``, which holds one top folder, and put that at ``folder`` when it is complete."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            for member in members:
                _check_member(member, archive)
            _check_space(folder.parent, sum(member.file_size for member in members), str(archive))
            file.extractall(aside)
        if not (aside / folder.name).is_dir():
            raise InputError(f"{archive}: holds no folder '{folder.name}'; it is not the BEIR archive")
        (aside / folder.name).replace(folder)
    except (zipfile.BadZipFile, *_DAMAGED) as error:
        if isinstance(error, InputError) or is_disk_full(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"{archive}: not a readable zip archive: {reason}; remove it and try again"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_member(member: zipfile.ZipInfo, archive: Path) -> None:
    """Refuse names and links that could reach outside the folder that is unpacked to ("zip slip")."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    link = stat.S_ISLNK(member.external_attr >> 16)
    if link or path.is_absolute() or ".." in path.parts or ":" in member.filename:
        raise InputError(f"{archive}: member '{member.filename}' reaches outside the archive; not unpacked")


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{what}: needs {needed / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} GiB are free; "
            "make room or set EFFIR_RAY_DATA to a folder on another disk"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
