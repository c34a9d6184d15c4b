"""A study whose folder is an object store's: this machine keeps what it needs of it in its cache.

The store is the truth. Files that are written once (rows, scores of queries, stages) come and go one by one;
what is written again (``study.json``, the sampler's database) is fetched before it is read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from effir_ray import storage
from effir_ray.caches import cache_folder
from effir_ray.files import whole

_LISTINGS = 5  # a folder that is compacted that often while it is read is no study's


def copy_of(uri: str) -> Path:
    """The folder at ``uri`` (a data set, a model) on this machine's disk, of the same name; fetched where it
    is not there as it is now. Raises InputError where there is none."""
    digest = hashlib.sha256(repr(storage.listing(uri)).encode()).hexdigest()[:16]
    folder = cache_folder() / "copies" / digest / storage.name_of(uri)
    if not folder.is_dir():
        storage.bring(uri, folder)
    return folder


@dataclass(frozen=True)
class Mirror:
    """``folder`` on this machine; ``uri`` is empty where that is all there is."""

    folder: Path
    uri: str = ""

    @classmethod
    def of(cls, place: Path | str) -> Self:
        """Of a path or a URI. Every machine of a cluster has the same folder for a URI."""
        if not storage.is_uri(place):
            return cls(Path(place))
        digest = hashlib.sha256(str(place).encode()).hexdigest()[:16]
        return cls(cache_folder() / "studies" / digest, str(place))

    @classmethod
    def to_read(cls, uri: str) -> Self:
        """Of a study that perhaps runs, on this machine too, for who only looks at its tables."""
        study = cls.of(uri)
        return cls(study.folder.with_name(f"{study.folder.name}-read"), study.uri)

    def __str__(self) -> str:
        """What the user called it."""
        return self.uri or str(self.folder)

    def at(self, name: str) -> str:
        """The URI of something in it; empty where there is none."""
        return storage.join(self.uri, name) if self.uri else ""

    def pull_file(self, name: str) -> None:
        """What the store has now, or nothing."""
        if not self.uri:
            return
        content, file = storage.get(self.at(name)), self.folder / name
        if content is None:
            file.unlink(missing_ok=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as aside:
            aside.write_bytes(content)

    def pull_files(self, name: str) -> None:
        """Files directly in a folder, each written once: those that are missing come, others go."""
        if not self.uri:
            return
        for _ in range(_LISTINGS):
            there = {each for each in storage.entries(self.at(name)) if not each.startswith(".")}
            here = {file.name for file in (self.folder / name).glob("*")}
            for each in here - there:
                (self.folder / name / each).unlink(missing_ok=True)
            for each in sorted(there - here):
                self.pull_file(f"{name}/{each}")
            if all((self.folder / name / each).exists() for each in there):
                return  # none was compacted meanwhile

    def push(self, file: Path) -> None:
        """A file below ``folder`` to the store."""
        if self.uri:
            storage.put(self.at(file.relative_to(self.folder).as_posix()), file.read_bytes())

    def push_files(self, name: str) -> None:
        """A folder's files are those that are here: new ones go to the store first, others are deleted there
        then. For the one process that may rewrite the folder."""
        if not self.uri:
            return
        there = storage.entries(self.at(name))
        here = {file.name: file for file in (self.folder / name).glob("*")}
        for each in here.keys() - there.keys():
            self.push(here[each])
        for each in there.keys() - here.keys():
            storage.remove(self.at(f"{name}/{each}"))
