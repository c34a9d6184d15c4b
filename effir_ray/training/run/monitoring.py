"""What is watched while a model trains: curves in TensorBoard, MFU, and a stop when training has failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from effir_ray.errors import TrialFailure
from effir_ray.training.run.trackers import numbers

if TYPE_CHECKING:
    import torch

    from effir_ray.models.retriever import Retriever
    from effir_ray.training.step.ladder import Rung


class TensorBoard:
    """Event files that ``tensorboard --logdir`` shows while training runs. A context manager."""

    def __init__(self, folder: Path, *, purge_from: int | None = None) -> None:
        """``purge_from``: a resumed run hides the events from this step on that a killed run had written."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_from)

    def on_row(self, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(f"train/{name}", value, row["step"])
        self._writer.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


class Utilization:
    """Model FLOPs utilization (MFU) of a worker: 3 x forward FLOPs / seconds / the device's peak FLOP/s.

    A backward pass costs two forwards, one for the inputs of every product and one for its weights; where the
    weights are frozen (under adapters, which are small) only the first. Padding and recomputation (GradCache,
    checkpointing) are work that the model did not ask for and do not count. Chowdhery et al. 2022 (PaLM,
    arXiv 2204.02311), appendix B. The peak is that of large matrix products on this device, measured once.
    """

    def __init__(
        self, retriever: Retriever, device: torch.device, dtype: torch.dtype, *, frozen: bool = False
    ) -> None:
        from effir_ray.compression.planning import within
        from effir_ray.encoding.gemm_peak import gemm_peak
        from effir_ray.models.accounting import flops

        config, plan = retriever.model.config, retriever.plan
        widths = [retriever.family.width(layer) for layer in retriever.family.layers(retriever.model)]

        def cost(tokens: int, rung: Rung | None) -> int:
            return flops(config, plan if rung is None else within(rung.plan(widths), plan), tokens)

        self._flops = cache(cost)
        self._forwards = 2 if frozen else 3
        self._peak = gemm_peak(device, dtype)

    def __call__(self, lengths: Sequence[int], seconds: float, rungs: Sequence[Rung] = ()) -> float:
        """MFU of a step that trained on texts of ``lengths`` tokens in ``seconds``, the model and ``rungs``
        of it.
        """
        forward = sum(self._flops(tokens, network) for network in (None, *rungs) for tokens in lengths)
        return self._forwards * forward / seconds / self._peak


class CollapseDetector:
    """Raises TrialFailure for a run that cannot be trusted: figures that are not finite, or collapse.

    Collapsed means that all documents have one embedding (mean cosine above ``cosine``) and InfoNCE says the
    model guesses (within ``tolerance`` of ln ``candidates``, the documents a query chooses from),
    ``patience`` steps in a row. The first ``grace`` steps are not judged: an untrained backbone starts near
    there.
    """

    def __init__(
        self,
        *,
        candidates: int,
        grace: int,
        patience: int = 10,
        cosine: float = 0.99,
        tolerance: float = 0.02,
    ) -> None:
        self._chance = math.log(max(candidates, 2))
        self._grace, self._patience = grace, patience
        self._cosine, self._tolerance = cosine, tolerance
        self._in_a_row = 0

    def on_row(self, row: Mapping[str, Any]) -> None:
        """``row`` has ``step``, ``loss``, ``loss_info_nce``, ``grad_norm`` and ``mean_cosine``."""
        broken = [
            f"{name} {row[name]}"
            for name in ("loss", "grad_norm", "mean_cosine")
            if not math.isfinite(row[name])
        ]
        if broken:
            raise TrialFailure(
                f"step {row['step']}: {', '.join(broken)}; try a lower learning_rate or precision float32"
            )
        info_nce, cosine = row["loss_info_nce"], row["mean_cosine"]
        guessing = abs(info_nce - self._chance) <= self._tolerance * self._chance
        collapsed = row["step"] > self._grace and guessing and cosine > self._cosine
        self._in_a_row = self._in_a_row + 1 if collapsed else 0
        if self._in_a_row >= self._patience:
            raise TrialFailure(
                f"step {row['step']}: the embeddings have collapsed: for {self._patience} steps the mean "
                f"cosine of the documents was above {self._cosine} (now {cosine:.4f}) and InfoNCE at chance "
                f"({info_nce:.3f}; chance is {self._chance:.3f}); lower learning_rate or lengthen warmup"
            )
