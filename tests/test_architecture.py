"""The floor plan: packages import only what lies below them, nothing in circles, and mostly at the top."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("errors", "provenance"),
    ("files", "readers", "parquet_footer", "progress", "contrastive", "pages"),
    ("caches", "parquet_files", "storage"),
    ("hardware", "leases", "mirrors"),
    ("config", "stages", "cluster"),
    ("models", "data"),
    ("encoding", "results"),
    ("compression",),
    ("evaluation",),
    ("training",),
    ("search",),
    ("demo", "doctor", "shrinking"),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A room imports only from floors below its own, and from itself."""

LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
LATE_SHARE = 0.08
"""Imports inside functions are for a command's fast start and a worker's light weight."""


@dataclass(frozen=True, kw_only=True)
class Import:
    source: str
    target: str
    line: int
    late: bool  # inside a function
    typing_only: bool

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "effir_ray").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(
    module: str, node: ast.AST, *, late: bool = False, typing_only: bool = False
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typed = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
        targets: list[str] = []
        if isinstance(child, ast.ImportFrom) and child.module:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            targets = [name if name in MODULES else child.module for name in names]
        elif isinstance(child, ast.Import):
            targets = [alias.name for alias in child.names]
        for target in targets:
            if target.split(".")[0] == "effir_ray":
                yield Import(
                    source=module,
                    target=target,
                    line=getattr(child, "lineno", 0),
                    late=late,
                    typing_only=typed,
                )
        yield from imports_of(module, child, late=inside, typing_only=typed)


IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, ast.parse(path.read_text()))]


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in MODULES} - {""} == set(LEVEL)


def test_no_room_imports_one_above_it_or_beside_it() -> None:
    wrong = [
        found.place
        for found in IMPORTS
        if room(found.source)  # the face, effir_ray/__init__, only hands names on
        and room(found.target)
        and room(found.source) != room(found.target)
        and LEVEL[room(found.target)] >= LEVEL[room(found.source)]
    ]
    assert not wrong, wrong


def test_nothing_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        if found.source != found.target and found.source != "effir_ray":
            graph[found.source].add(found.target)
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_few_imports_are_inside_functions() -> None:
    late = [found.place for found in IMPORTS if found.late]
    assert len(late) < LATE_SHARE * len(IMPORTS), f"{len(late)} of {len(IMPORTS)}: {late}"


def test_rooms_say_what_they_are_for() -> None:
    empty = [
        name
        for name, path in MODULES.items()
        if path.name == "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not empty, empty


def test_tests_mirror_the_rooms_and_import_no_other_test() -> None:
    folders = {path.parent.relative_to(ROOT / "effir_ray") for path in (ROOT / "effir_ray").rglob("*.py")}
    allowed = folders | {Path("helpers"), Path("outside")}
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert not [path for path in tests if path.parent.relative_to(ROOT / "tests") not in allowed]
    wrong = [
        f"{path}: {node.module}"
        for path in tests
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("tests")
        and not (node.module or "").startswith("tests.helpers")
    ]
    assert not wrong, wrong
