"""How a backbone's hidden states become one embedding a text, and the two kinds of text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from effir_ray.config import Config

TextKind = Literal["query", "document"]


class RetrieverSpec(Config):
    """pooling "last" takes the last real token (with ``append_eos`` the EOS token, as in the paper, section
    4).

    Prompts are put before the text as they are. ``max_length`` counts every token, prompt and EOS included.
    """

    pooling: Literal["last", "mean", "cls"]
    normalize: bool = True
    append_eos: bool
    query_prompt: str = ""
    document_prompt: str = ""
    max_length: int = Field(default=512, ge=2)
