"""A schedule says what is asked of a backbone: which sublayers to drop and how much width to remove."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from effir_ray.config import Config, Length, Place, Seed, says_nothing

Criterion = Literal["cosine", "pooled", "dev-loss", "random"]
Unit = Literal["attention", "mlp", "block"]
"""What can be dropped of a layer; a block is its attention and its MLP."""
UNITS: tuple[Unit, ...] = get_args(Unit)
WidthMethod = Literal["self-slimming", "magnitude", "activation", "gate-activation", "taylor", "random"]


def parse_drop(value: Any) -> Any:
    """``8`` is a count; ``"3,5"`` and ``[3, 5]`` are layer indices; ``"5,"`` is the one layer 5."""
    if isinstance(value, str):
        parts = [part for part in value.split(",") if part.strip()]
        try:
            return tuple(int(part) for part in parts) if "," in value else int(value)
        except ValueError:
            raise ValueError("expected a count such as 4, or layer indices such as 3,5") from None
    if isinstance(value, list | tuple):
        return tuple(value)
    return value


Drop = Annotated[int | tuple[int, ...], BeforeValidator(parse_drop)]


def parse_widths(value: Any) -> Any:
    """``"1536,1024,0"`` and ``[1536, 1024, 0]`` are one width a layer; ``""`` is none."""
    if isinstance(value, str):
        try:
            return tuple(int(part) for part in value.split(",") if part.strip())
        except ValueError:
            raise ValueError("expected the neurons that each layer keeps, such as 1536,1024,0") from None
    return tuple(value) if isinstance(value, list) else value


Width = Annotated[int, Field(ge=0, le=2**24)]
Widths = Annotated[tuple[Width, ...], Field(max_length=1024), BeforeValidator(parse_widths)]


class Schedule(Config):
    """One point of the search: depth (sublayers dropped) first, then width (neurons removed).

    ``drop_*`` take a count (the least important go, by ``importance``) or explicit layer indices. Order of
    application: the last blocks, whole blocks, then attention and MLP sublayers of what remains.
    ``width_reduction`` is the fraction of the remaining intermediate neurons removed, ranked globally
    (paper section 3.2). ``layer_widths`` says instead how many neurons each layer keeps, its best by the same
    scores: a number a layer of the backbone, 0 exactly where no MLP is left (not in the paper).
    ``width_multiple`` divides every width that changes; None takes 64 for models of GPU size and 8 for small
    ones (``planning.grain``). ``vocabulary`` is how many tokens stay, those that the calibration's text needs
    most (not in the paper); 0 keeps all. ``dimension`` is how long embeddings are, projected to what tells
    the calibration's texts apart best (not in the paper); 0 leaves all dimensions.
    """

    drop_attention: Drop = 0
    drop_mlp: Drop = 0
    drop_block: Drop = 0
    drop_last_blocks: int = Field(default=0, ge=0, le=1024)
    importance: Criterion = "cosine"
    width_reduction: float = Field(default=0.0, ge=0.0, lt=1.0)
    layer_widths: Widths = Field(default=(), exclude_if=says_nothing)
    width_method: WidthMethod = "self-slimming"
    width_multiple: int | None = Field(default=None, ge=1, le=2**16)
    vocabulary: int = Field(default=0, ge=0, le=2**24, exclude_if=says_nothing)
    dimension: int = Field(default=0, ge=0, le=2**16, exclude_if=says_nothing)

    @model_validator(mode="after")
    def _sound(self) -> Schedule:
        for name in ("drop_attention", "drop_mlp", "drop_block"):
            drop = getattr(self, name)
            layers = drop if isinstance(drop, tuple) else ()
            if (isinstance(drop, int) and drop < 0) or any(layer < 0 for layer in layers):
                raise ValueError(f"{name} takes a count or layer indices that are not negative")
            if len(set(layers)) < len(layers):
                raise ValueError(f"{name} names a layer twice")
        if self.width_reduction and self.layer_widths:
            raise ValueError("give width_reduction or layer_widths, not both")
        return self

    @property
    def narrows(self) -> bool:
        """Whether it says how many neurons stay."""
        return self.width_reduction > 0 or bool(self.layer_widths)

    @property
    def name(self) -> str:
        """The paper's notation: ``16M8A-w30``, ``last4B``, ``M[3,5]``, ``full``; ``w[64x3,48]``: three layers
        of 64 neurons, then one of 48, ``v8000``: 8,000 tokens, ``d128``: embeddings of 128 dimensions."""
        parts = [
            _drop_name(self.drop_last_blocks, "B", "last"),
            _drop_name(self.drop_block, "B"),
            _drop_name(self.drop_mlp, "M"),
            _drop_name(self.drop_attention, "A"),
        ]
        depth = "".join(parts)
        width = f"w{100 * self.width_reduction:g}" if self.width_reduction else ""
        widths = _widths_name(self.layer_widths)
        tokens = f"v{self.vocabulary}" if self.vocabulary else ""
        shorter = f"d{self.dimension}" if self.dimension else ""
        return "-".join(part for part in (depth, width, widths, tokens, shorter) if part) or "full"


def _drop_name(drop: int | tuple[int, ...], unit: str, prefix: str = "") -> str:
    if isinstance(drop, tuple):
        return f"{unit}[{','.join(str(layer) for layer in drop)}]" if drop else ""
    return f"{prefix}{drop}{unit}" if drop else ""


def _widths_name(widths: tuple[int, ...]) -> str:
    runs = [(width, len(list(layers))) for width, layers in groupby(widths)]
    shown = ",".join(f"{width}x{count}" if count > 1 else str(width) for width, count in runs)
    return f"w[{shown}]" if runs else ""


class GateTraining(Config):
    """Training of the self-slimming gates (paper section 3.2) and data for the other width methods."""

    steps: int = Field(default=500, ge=1, le=10**7)
    batch_size: int = Field(default=32, ge=2, le=2**16)
    pairs: int = Field(default=16000, ge=2, le=10**8)


class Calibration(Config):
    """What importance and neuron scores are measured on; one object, hence one set of defaults, for the
    command, for Python and for a study.

    texts: how many documents of ``dataset`` importance is measured on, or of ``texts_from``: a corpus, or
    files of texts or of pairs, as ``TrainConfig.dataset`` takes them; gates: training pairs of ``dataset``
    for neurons (and how many dev pairs the dev loss takes); max_length: tokens of a text; seed: which texts
    and pairs are drawn, and everything random in the methods.
    """

    dataset: Place = "stdlib"
    texts: int = Field(default=256, ge=1, le=10**7)
    texts_from: Place | None = None
    gates: GateTraining = GateTraining()
    max_length: Length = 512
    seed: Seed = 0


CALIBRATION = Calibration()
"""The defaults of the command, of Python and of a study."""
