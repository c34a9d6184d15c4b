"""``import effir_ray``: light, typed and complete."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import effir_ray


@pytest.mark.parametrize("name", [name for name in effir_ray.__all__ if name != "__version__"])
def test_every_public_name_loads_and_is_documented(name: str) -> None:
    assert getattr(effir_ray, name).__doc__


def test_type_checkers_and_the_lazy_table_see_the_same_names() -> None:
    tree = ast.parse(Path(effir_ray.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname or alias.name: f"{node.module.removeprefix('effir_ray.')}:{alias.name}"
        for node in guarded.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert imported == effir_ray._PUBLIC
    assert sorted([*imported, "__version__"]) == sorted(effir_ray.__all__) == dir(effir_ray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = effir_ray.nonsense


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import effir_ray; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert not {name.partition(".")[0] for name in loaded} & {"torch", "ray", "pydantic", "pyarrow", "numpy"}
