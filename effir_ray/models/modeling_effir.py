# mypy: ignore-errors
# Reason: the classes below subclass transformers' own, which are untyped, and the file must run without
# effir-ray.
"""Models with dropped attention or MLP sublayers and narrowed MLPs, for transformers >= 5.21.

This one file is copied into every compressed checkpoint, so that ``AutoModel.from_pretrained(folder,
trust_remote_code=True)`` and ``SentenceTransformer(folder, trust_remote_code=True)`` need nothing else.
config.json says what is gone in transformers' own schema, with the layer numbers of the uncompressed
backbone:

    "per_layer_config": {"2": {"skip": ["mlp"]}, "3": {"intermediate_size": 1024}, "5": {"skip":
    ["attention", "mlp"]}}

A dropped sublayer does not exist: no parameters, no norm, no FLOPs; where no attention of a kind is left,
its mask and rotary embedding are not computed. The models encode (no cache, no LM head).

Shapes: B texts, T tokens, H hidden size, I intermediate neurons of one layer.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, _bidirectional_window_overlay
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.utils.output_capturing import capture_outputs

# --- blocks ---


class SlimLayer:
    """A block whose sublayers may be missing: then ``attention_parts[0]`` or ``mlp_parts[0]`` is None."""

    attention_parts: tuple[str, ...]
    mlp_parts: tuple[str, ...]
    # (name of a Linear, axis of its weight that counts neurons, rows a neuron: 2 for a fused gate and up)
    neuron_linears: tuple[tuple[str, int, int], ...]

    @property
    def has_attention(self) -> bool:
        return getattr(self, self.attention_parts[0]) is not None

    def skip(self, kind: str) -> None:
        """Remove the "attention" or "mlp" sublayer together with its norms."""
        for name in {"attention": self.attention_parts, "mlp": self.mlp_parts}[kind]:
            setattr(self, name, None)

    def set_width(self, width: int) -> None:
        """Give the MLP ``width`` neurons with fresh, uninitialised weights (a checkpoint fills them)."""
        for name, axis, multiple in self.neuron_linears:
            old = self.get_submodule(name)
            shape = [old.out_features, old.in_features]
            shape[axis] = width * multiple
            with old.weight.device:
                new = nn.Linear(shape[1], shape[0], bias=old.bias is not None, dtype=old.weight.dtype)
            self.set_submodule(name, new)


class SlimPreNormLayer(SlimLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)): Llama, Mistral, Qwen."""

    attention_parts = ("self_attn", "input_layernorm")
    mlp_parts = ("mlp", "post_attention_layernorm")
    neuron_linears = (("mlp.gate_proj", 0, 1), ("mlp.up_proj", 0, 1), ("mlp.down_proj", 1, 1))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: (B, T, H)."""
        if self.self_attn is not None:
            update, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + update
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class SlimSandwichLayer(SlimLayer):
    """Norms before and after each sublayer: Gemma 2 and 3."""

    attention_parts = ("self_attn", "input_layernorm", "post_attention_layernorm")
    mlp_parts = ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    neuron_linears = SlimPreNormLayer.neuron_linears

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: (B, T, H)."""
        if self.self_attn is not None:
            update, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + self.post_attention_layernorm(update)
        if self.mlp is not None:
            update = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            hidden_states = hidden_states + self.post_feedforward_layernorm(update)
        return hidden_states


class EffirGemma3Layer(SlimSandwichLayer, Gemma3DecoderLayer): ...


class EffirModernBertLayer(SlimLayer, ModernBertEncoderLayer):
    """Pre-norm encoder block; gate and up projection are the two halves of ``Wi``."""

    attention_parts = ("attn", "attn_norm")
    mlp_parts = ("mlp", "mlp_norm")
    neuron_linears = (("mlp.Wi", 0, 2), ("mlp.Wo", 1, 1))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: (B, T, H)."""
        if self.attn is not None:
            hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), **kwargs)[0]
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return hidden_states


class EffirBertLayer(SlimLayer, BertLayer):
    """Post-norm block: the norm after the sum belongs to the sublayer and goes with it."""

    attention_parts = ("attention",)
    mlp_parts = ("intermediate", "output")
    neuron_linears = (("intermediate.dense", 0, 1), ("output.dense", 1, 1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states: (B, T, H). BertEncoder also passes cross-attention arguments, all None."""
        if self.attention is not None:
            kwargs.pop("encoder_attention_mask", None)
            hidden_states, _ = self.attention(hidden_states, attention_mask, **kwargs)
        if self.intermediate is not None:
            hidden_states = self.output(self.intermediate(hidden_states), hidden_states)
        return hidden_states


# --- models ---


def restructure(model: SlimModel, overrides: dict[int, dict[str, Any]]) -> None:
    """Give every block its compressed class and shape; what stays as it was keeps its weights."""
    for index, layer in enumerate(model.slim_layers):
        layer.__class__ = model.layer_class
        entry = overrides.get(index, {})
        for kind in entry.get("skip", ()):
            layer.skip(kind)
        if "intermediate_size" in entry and "mlp" not in entry.get("skip", ()):
            layer.set_width(entry["intermediate_size"])


class SlimModel:
    """Builds the backbone's own class, then takes away what ``config.per_layer_config`` says is gone."""

    layer_class: type[nn.Module]

    def __init__(self, config: hf.PreTrainedConfig, **kwargs: Any) -> None:
        # transformers refuses to read config.intermediate_size while it differs by layer: set it aside.
        overrides = config._heterogeneity_spec.per_layer_overrides if config.is_heterogeneous else {}
        config.per_layer_config = None
        super().__init__(config, **kwargs)
        restructure(self, overrides)
        config.per_layer_config = overrides

    @property
    def slim_layers(self) -> nn.ModuleList:
        return self.layers


class SlimDecoder(SlimModel):
    """One forward for every family with rotary embeddings (the encoder ModernBERT included)."""

    rotary_by_kind = False

    def attention_kind(self, index: int) -> str:
        """Which mask and rotary embedding a layer uses; Llama and Mistral have one kind for all layers."""
        if getattr(self.config, "layer_types", None):
            return self.config.layer_types[index]
        sliding = getattr(self.config, "sliding_window", None) is not None
        return "sliding_attention" if sliding else "full_attention"

    def build_mask(self, kind: str, **inputs: Any) -> Any:
        create = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        return create(config=self.config, past_key_values=None, **inputs)

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def finish(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """input_ids, attention_mask, position_ids: (B, T) -> last_hidden_state (B, T, H); fills no cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None:
            raise ValueError("an effir model encodes whole texts; past_key_values is not supported")
        x = self.embed(input_ids, inputs_embeds)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        inputs = {"inputs_embeds": x, "attention_mask": attention_mask, "position_ids": position_ids}
        shared: dict[str, dict[str, Any]] = {}
        for index, layer in enumerate(self.layers):
            kind = self.attention_kind(index) if layer.has_attention else ""
            if kind and kind not in shared:
                rotary = self.rotary_emb(x, position_ids, *((kind,) if self.rotary_by_kind else ()))
                shared[kind] = {
                    "attention_mask": self.build_mask(kind, **inputs),
                    "position_embeddings": rotary,
                }
            x = layer(x, position_ids=position_ids, **shared.get(kind, {}), **kwargs)
        return BaseModelOutput(last_hidden_state=self.finish(x))


def _decoder(name: str, slim_layer: type, layer: type, config: type, model: type) -> tuple[type, ...]:
    """Layer, configuration and model class of a decoder that SlimDecoder's forward fits as it is."""
    here = {"__module__": __name__}
    new_layer = type(f"Effir{name}Layer", (slim_layer, layer), dict(here))
    new_config = type(f"Effir{name}Config", (config,), {**here, "model_type": f"effir_{config.model_type}"})
    members = {**here, "config_class": new_config, "layer_class": new_layer}
    return new_layer, new_config, type(f"Effir{name}Model", (SlimDecoder, model), members)


EffirLlamaLayer, EffirLlamaConfig, EffirLlamaModel = _decoder(
    "Llama", SlimPreNormLayer, LlamaDecoderLayer, hf.LlamaConfig, hf.LlamaModel
)
EffirMistralLayer, EffirMistralConfig, EffirMistralModel = _decoder(
    "Mistral", SlimPreNormLayer, MistralDecoderLayer, hf.MistralConfig, hf.MistralModel
)
EffirQwen2Layer, EffirQwen2Config, EffirQwen2Model = _decoder(
    "Qwen2", SlimPreNormLayer, Qwen2DecoderLayer, hf.Qwen2Config, hf.Qwen2Model
)
EffirQwen3Layer, EffirQwen3Config, EffirQwen3Model = _decoder(
    "Qwen3", SlimPreNormLayer, Qwen3DecoderLayer, hf.Qwen3Config, hf.Qwen3Model
)
EffirGemma2Layer, EffirGemma2Config, EffirGemma2Model = _decoder(
    "Gemma2", SlimSandwichLayer, Gemma2DecoderLayer, hf.Gemma2Config, hf.Gemma2Model
)


class EffirGemma3TextConfig(hf.Gemma3TextConfig):
    model_type = "effir_gemma3_text"


class EffirGemma3TextModel(SlimDecoder, hf.Gemma3TextModel):
    config_class = EffirGemma3TextConfig
    layer_class = EffirGemma3Layer
    rotary_by_kind = True

    def build_mask(self, kind: str, **inputs: Any) -> Any:
        if self.config.use_bidirectional_attention:  # EmbeddingGemma
            window = _bidirectional_window_overlay(self.config.sliding_window)
            inputs["or_mask_function"] = window if kind == "sliding_attention" else _attend_everywhere
        return super().build_mask(kind, **inputs)


def _attend_everywhere(*indices: Any) -> torch.Tensor:
    return torch.tensor(True, dtype=torch.bool)


class EffirModernBertConfig(hf.ModernBertConfig):
    model_type = "effir_modernbert"


class EffirModernBertModel(SlimDecoder, hf.ModernBertModel):
    config_class = EffirModernBertConfig
    layer_class = EffirModernBertLayer
    rotary_by_kind = True

    def build_mask(self, kind: str, *, inputs_embeds: Any, attention_mask: Any, position_ids: Any) -> Any:
        sliding = kind == "sliding_attention"
        create = create_bidirectional_sliding_window_mask if sliding else create_bidirectional_mask
        return create(config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask)

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        return self.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)

    def finish(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.final_norm(hidden_states)


class EffirBertConfig(hf.BertConfig):
    model_type = "effir_bert"


class EffirBertModel(SlimModel, hf.BertModel):
    config_class = EffirBertConfig
    layer_class = EffirBertLayer

    def __init__(self, config: hf.PreTrainedConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)

    @property
    def slim_layers(self) -> nn.ModuleList:
        return self.encoder.layer

    def _create_attention_masks(self, attention_mask: Any, encoder_attention_mask: Any, **kwargs: Any) -> Any:
        if not any(layer.has_attention for layer in self.slim_layers):
            return None, None
        return super()._create_attention_masks(
            attention_mask=attention_mask, encoder_attention_mask=encoder_attention_mask, **kwargs
        )


MODEL_CLASSES = (
    EffirLlamaModel,
    EffirMistralModel,
    EffirQwen2Model,
    EffirQwen3Model,
    EffirGemma2Model,
    EffirGemma3TextModel,
    EffirModernBertModel,
    EffirBertModel,
)
