"""What runs the model and its optimizer on all ranks: DeepSpeed at a ZeRO stage, or plain data parallelism.

At the end AdamW, the learning rate of every step, and the few collectives that training needs, each of which
is the identity in a single process.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.text_encoder import TextEncoder


class Passes(Protocol):
    """Forward passes, see ``TextEncoder``, and backward passes. ``last`` marks the backward pass after which
    the optimizer steps. ``padded``: a pass costs as much as if all its texts were as long as the longest.
    """

    device: torch.device
    padded: bool

    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor: ...
    def backward(self, loss: Tensor, *, last: bool) -> None: ...


class Engine(Passes, Protocol):
    """Averages gradients over ranks."""

    name: str
    encoder: TextEncoder

    def step(self, rate: float) -> float:
        """Clip, update at learning rate ``rate``, clear the gradients. Returns the norm before clipping: NaN
        or infinite where a gradient is.
        """
        ...

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it the parameters are complete on every rank (a collective: all ranks enter together)."""
        ...

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The complete averaged gradient, after the last backward pass and before ``step``."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state; every rank calls it and writes its part."""
        ...

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote; InputError where a file holds anything but tensors and settings."""
        ...


def zero_stage(config: TrainConfig, *, bfloat16: bool) -> int:
    """The stage that runs: without ZeRO DeepSpeed sums the passes of a step in the model's own bfloat16, and
    refuses to sum them in float32.
    """
    return max(config.zero_stage, 1) if bfloat16 else config.zero_stage


def deepspeed_settings(config: TrainConfig, *, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration for a run."""
    # A step of GradCache sums many passes: in bfloat16 the small gradients of later ones would be lost.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if bfloat16 else {}
    return {
        **sums,
        "train_micro_batch_size_per_gpu": config.batch_size // config.most_workers,
        "gradient_accumulation_steps": 1,  # passes of one step are told apart by their boundary instead
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {
            "stage": zero_stage(config, bfloat16=bfloat16),
            # Norms and biases stay whole; every matrix is partitioned.
            "stage3_param_persistence_threshold": 4096,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """ZeRO stage 0 to 3 (Rajbhandari et al. 2020, arXiv 1910.02054)."""

    def __init__(
        self, encoder: TextEncoder, config: TrainConfig, device: torch.device, bfloat16: bool
    ) -> None:
        deepspeed = _import_deepspeed()
        optimizer = adamw(encoder.parameters(), rate=config.learning_rate, weight_decay=config.weight_decay)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=encoder,
            optimizer=optimizer,
            config=deepspeed_settings(config, bfloat16=bfloat16),
            dist_init_required=False,
        )
        self._known = _zero_classes()
        self._engine.checkpoint_engine = _only_weights(self._known)
        self._deepspeed = deepspeed
        self._stage = zero_stage(config, bfloat16=bfloat16)
        asked = "" if self._stage == config.zero_stage else " (ZeRO-0 would sum gradients in bfloat16)"
        self.name = f"DeepSpeed ZeRO-{self._stage}{asked}"
        self.device, self.encoder, self.padded = device, encoder, encoder.padded

    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        embeddings: Tensor = self._engine(ids, lengths)
        return embeddings

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # Without ZeRO the optimizer stays the plain one, which keeps no norm.
        norm = gradient_norm(self._engine.module) if self._stage == 0 else 0.0
        self._engine.step()
        if self._stage == 3:
            # Stage 3 overwrites this sum in a step's first backward pass, but only where that one has a
            # gradient: a sublayer that it skips (see ``ElasticStep``) would add to the step before.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        return norm if self._stage == 0 else float(self._engine.get_global_grad_norm())

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        with self._deepspeed.zero.GatheredParameters(list(parameters)):
            yield

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient: Tensor = self._deepspeed.utils.safe_get_full_grad(parameter)
        return gradient

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        check_weights(folder, self._known)
        self._engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)


class PlainEngine:
    """Plain data parallelism: model and optimizer whole on every rank, gradients averaged at the end."""

    def __init__(
        self,
        encoder: TextEncoder,
        config: TrainConfig,
        device: torch.device,
        bfloat16: bool,
        reason: str = "",
    ) -> None:
        self.name = f"DDP ({reason})" if reason else "DDP"
        self.device, self.encoder, self.padded = device, encoder, encoder.padded
        self._bfloat16 = bfloat16
        self._clip = config.max_grad_norm
        self._parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        for parameter in self._parameters:  # adapters of a bfloat16 model
            parameter.data = parameter.data.float()
        self._optimizer = adamw(self._parameters, rate=config.learning_rate, weight_decay=config.weight_decay)

    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        # float32 weights with bfloat16 products: the optimizer then has its full-precision copy already.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
            embeddings: Tensor = self.encoder(ids, lengths)
        return embeddings

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        if last and world_size() > 1:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()

    def step(self, rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        yield

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def save(self, folder: Path) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            weights = {name: value for name, value in self.encoder.named_parameters() if value.requires_grad}
            torch.save({"weights": weights, "optimizer": self._optimizer.state_dict()}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        check_weights(folder)
        state = load_weights(folder / "state.pt", self.device)
        self.encoder.load_state_dict(state["weights"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])


def gradient_norm(module: nn.Module) -> float:
    """L2 norm of all gradients together."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def build_engine(
    retriever: Retriever, config: TrainConfig, device: torch.device, *, bfloat16: bool
) -> Engine:
    """DeepSpeed where it works; plain data parallelism, with the reason in its name, where it does not, and
    where the number of workers may change: every node then has to read what any other saved."""
    encoder = TextEncoder(retriever)
    if isinstance(config.workers, tuple):
        return PlainEngine(encoder, config, device, bfloat16, "the number of workers may change")
    try:
        return DeepSpeedEngine(encoder, config, device, bfloat16)
    except (ImportError, OSError, RuntimeError) as error:
        if config.zero_stage == 3:
            raise  # plain data parallelism would need the memory that ZeRO was asked to save
        reason = f"DeepSpeed does not start: {type(error).__name__}: {str(error).splitlines()[0]}"
        return PlainEngine(encoder, config, device, bfloat16, reason)


def check_weights(folder: Path, known: Sequence[type] = ()) -> None:
    """Raise InputError unless every file of a training checkpoint holds only tensors, plain data and
    instances of the ``known`` classes. No tensor is read.

    Each rank checks the files of all: a rank that alone found a bad one would leave the others waiting.
    """
    allowed = {f"{kind.__module__}.{kind.__name__}" for kind in known}
    for file in sorted(folder.rglob("*.pt")):
        try:
            strange = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - allowed
        except Exception as error:  # torch has no type for files that are not its own
            raise _not_ours(file, type(error).__name__) from None
        if strange:
            raise _not_ours(file, f"it names {', '.join(sorted(strange))}")


def load_weights(file: Path | str, device: Any, known: Sequence[type] = ()) -> Any:
    """``torch.load`` that runs no code of the file, see ``check_weights``."""
    try:
        with torch.serialization.safe_globals(list(known)):
            return torch.load(file, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _not_ours(file, type(error).__name__) from None


def _not_ours(file: Path | str, reason: str) -> InputError:
    return InputError(
        f"{file}: not a training checkpoint of effir-ray, or damaged ({reason}); it was not loaded, "
        "because it could run code of others. Remove its folder or start the run over"
    )


def _zero_classes() -> tuple[type, ...]:
    """The classes whose instances are in the states that ZeRO writes."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address


def _only_weights(known: Sequence[type]) -> Any:
    """DeepSpeed's reader and writer of files, without its ``torch.load(weights_only=False)``."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class OnlyWeights(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
        def __init__(self) -> None:
            super().__init__()
            self.zipfile_serialization = True  # the other format cannot be checked without being read

        def load(self, path: str, map_location: Any = None) -> Any:
            return load_weights(path, map_location, known)

    return OnlyWeights()


def _import_deepspeed() -> Any:
    """DeepSpeed, without its compiled all-reduce for CPU workers of one machine.

    Building that takes a compiler and, at first use, half a minute; gloo already does the work.
    """
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def learning_rate(
    step: int, *, total: int, peak: float, warmup: float, schedule: Literal["linear", "cosine"]
) -> float:
    """The rate of 0-based ``step`` of ``total``: up linearly over the first ``warmup`` fraction, then down.

    The first step already moves (rate peak / warm-up steps) and the last one still does: no step is wasted on
    a rate of 0.
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    left = 1 - (step - rising) / max(total - rising, 1)  # 1 at the peak, just above 0 at the last step
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def adamw(parameters: Iterable[nn.Parameter], *, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019) on matrices only, norms and biases left alone."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    # One fused kernel a tensor: several times faster than the plain loop on CPUs, and on GPUs.
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=True)


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
