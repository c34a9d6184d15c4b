"""``python tests/outside/borrow_torch.py VENV``: make this environment's torch importable in VENV, no more.

torch is a gigabyte and more; another copy a virtual environment would prove nothing. The packages that make
it up are linked into a folder beside ours, which VENV then searches. pip sees them and leaves them alone.
"""

import re
import sys
import sysconfig
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

_BINARIES = ("nvidia-", "triton", "cuda-")  # of builds for GPUs


def torch_packages() -> list[Distribution]:
    """torch, and what holds the libraries it was built against."""
    torch = distribution("torch")
    found = [torch]
    for requirement in torch.requires or ():
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if name.startswith(_BINARIES):
            try:
                found.append(distribution(name))
            except PackageNotFoundError:  # for another platform
                continue
    return found


def borrow(venv: Path) -> None:
    ours = Path(sys.prefix) / "torch-alone"
    ours.mkdir(exist_ok=True)
    for package in torch_packages():
        for top in {file.parts[0] for file in package.files or () if file.parts[0] != ".."}:
            link = ours / top
            link.unlink(missing_ok=True)
            link.symlink_to(Path(str(package.locate_file(top))).resolve())
    inside = sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)})
    (Path(inside) / "torch.pth").write_text(f"{ours}\n", encoding="utf-8")


if __name__ == "__main__":
    borrow(Path(sys.argv[1]).resolve())
