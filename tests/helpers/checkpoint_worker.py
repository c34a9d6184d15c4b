"""Saves and restores training checkpoints at every ZeRO stage, and loads them with a pickle planted in them.

Started by ``test_engine.py``: ``python checkpoint_worker.py RANK RANKS PORT FOLDER``. Rank 0 prints one JSON
line: {"ZeRO stage, adapters or not, dtype": what became of it}.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from effir_ray.errors import InputError
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import LoraConfig, TrainConfig
from effir_ray.training.run.loop import prepare
from effir_ray.training.step.engine import Engine


class Planted:
    """Unpickled by a loader that is not careful, it leaves a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def build(zero: int, lora: bool, bfloat16: bool, ranks: int) -> Engine:
    config = TrainConfig(
        dataset="unused",
        zero_stage=zero,
        lora=LoraConfig(r=2, alpha=4) if lora else None,
        workers=ranks,
        batch_size=2 * ranks,
    )
    dtype = "bfloat16" if bfloat16 and lora else "float32"
    retriever = load_retriever("random:llama", dtype=dtype)
    return prepare(retriever, config, torch.device("cpu"), bfloat16=bfloat16)


def step(engine: Engine, seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(10, 200, (12,))
    embedding = engine(ids, torch.tensor([7, 5]))
    engine.backward((embedding * torch.randn(embedding.shape)).sum(), last=True)
    engine.step(1e-2)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.encoder.named_parameters():
        if parameter.requires_grad:
            with engine.whole([parameter]):
                found[name] = parameter.detach().float().clone()
    return found


def restored_equals(folder: Path, *settings: Any) -> bool:
    """Whether a step after loading gives the weights that the same step gave without a restart."""
    engine = build(*settings)
    step(engine, 1)
    engine.save(folder)
    step(engine, 2)
    expected = weights(engine)
    fresh = build(*settings)
    dist.barrier()
    fresh.load(folder)
    step(fresh, 2)
    found = weights(fresh)
    return all(torch.equal(found[name], value) for name, value in expected.items())


def planted(folder: Path, rank: int, *settings: Any) -> list[str]:
    """The messages of loading the checkpoint with a pickle planted in each of its files in turn."""
    messages = []
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*.pt")):
        copy, mark = folder.with_name("planted"), folder.with_name("mark")
        if rank == 0:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            torch.save({"module": Planted(mark), "optimizer_state_dict": Planted(mark)}, copy / file)
        dist.barrier()
        engine = build(*settings)
        try:
            engine.load(copy)
        except InputError as error:
            messages.append(str(error))
        else:
            raise AssertionError(f"{file}: a planted pickle was loaded")
        dist.barrier()
        assert not mark.exists(), f"{file}: the pickle ran"
    return messages


def main() -> None:
    rank, ranks, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    report = {}
    for zero, lora, bfloat16 in itertools.product(range(4), (False, True), (False, True)):
        folder = out / f"{zero}{lora}{bfloat16}"
        settings = (zero, lora, bfloat16, ranks)
        equal = restored_equals(folder, *settings)
        messages = [] if bfloat16 else planted(folder, rank, *settings)
        report[f"{zero} {lora} {bfloat16}"] = {"equal": equal, "messages": messages}
    if rank == 0:
        (out / "report.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
