"""The few collectives that training needs. Each is the identity in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """(m, ...) of every rank -> (world * m, ...) in the order of ranks, on every rank; not differentiable."""
    if world_size() == 1:
        return rows.detach()
    rows = rows.detach().contiguous()
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered)


def largest(value: float, device: torch.device) -> float:
    """The largest ``value`` of any rank."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(float(value), device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def total(value: float, device: torch.device) -> float:
    """The sum of ``value`` over ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(float(value), device=device)
    dist.all_reduce(tensor)
    return float(tensor)
