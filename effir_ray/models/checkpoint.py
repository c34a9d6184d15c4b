"""Saving a retriever as one folder that effir-ray, transformers and sentence-transformers load.

config.json             of the plain architecture where that allows it (``ordinary``), else with
                        per_layer_config and auto_map
model*.safetensors      sharded above 5 GB; layers are numbered as config.json has them: anew in an ordinary
                        checkpoint, as in the backbone otherwise
modeling_effir.py       self-contained modelling code (not in an ordinary checkpoint)
tokenizer*.json         adds EOS by itself where the pooling wants it
modules.json, 1_Pooling/, ...   sentence-transformers' description of pooling, normalisation and prompts, and
                        the projection of shorter embeddings, 2_Dense/
effir.json              effir-ray's own: pooling and prompts, kept blocks and neurons, the backbone's name
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from effir_ray.errors import InputError
from effir_ray.models.architecture import DROP_LISTS, is_compressed, model_class
from effir_ray.models.folder import OWN_FILE, REMOTE_CODE, RetrieverSpec
from effir_ray.models.ordinary import Layout, choose_layout, kept_blocks, ordinary_config, place_in_backbone
from effir_ray.models.projection import NAME, projection_of, write_dense
from effir_ray.models.weights import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from effir_ray.models.retriever import Retriever

MAX_SHARD = "5GB"
_POOLING_NAMES = {"last": "lasttoken", "mean": "mean", "cls": "cls"}


def save_checkpoint(retriever: Retriever, folder: Path) -> Layout:
    """Write ``folder``, which appears complete or not at all; an existing one is replaced.

    Returns which of the two layouts was written, and why. Loaded again, the retriever has the same plan, with
    the layer numbers of the backbone, whichever it was. Raises InputError when ``folder`` exists and is
    something other than a checkpoint, and for a quantised model.
    """
    folder = Path(folder)
    _refuse_quantised(retriever)
    if folder.exists() and any(folder.iterdir()) and not (folder / OWN_FILE).is_file():
        raise InputError(f"{folder} exists and is not an effir-ray checkpoint; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        layout = choose_layout(retriever.model.config, retriever.plan)
        plain = layout.ordinary and is_compressed(retriever.model.config)
        (_write_ordinary if plain else _write_model)(retriever, temporary)
        retriever.tokenizer.save_pretrained(temporary)
        _write_sentence_transformers(retriever, temporary)
        _write_own(retriever, temporary, plain)
        _make_readable(temporary)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return layout


def _refuse_quantised(retriever: Retriever) -> None:
    """Integers and their scales have no place in the formats that others read."""
    for name, value in retriever.model.state_dict().items():
        inside = name.startswith(retriever.family.blocks + ".")
        if inside and not (isinstance(value, Tensor) and value.dtype.is_floating_point):
            raise InputError(
                f"{retriever.name}: {name} is quantised and cannot be saved as a checkpoint; save the model "
                "first, and quantise it after loading"
            )


def _make_readable(folder: Path) -> None:
    """Temporary files belong to their owner alone; a checkpoint is for everyone, like any file."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _replace(new: Path, folder: Path) -> None:
    if folder.exists():
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
        folder.rename(aside / "old")
        new.rename(folder)
        shutil.rmtree(aside)
    else:
        new.rename(folder)


def _write_model(retriever: Retriever, folder: Path) -> None:
    """Layers as they are numbered in memory; with modelling code where the model is compressed."""
    model, config = retriever.model, retriever.model.config
    settings: dict[str, Any] = {"architectures": [type(model).__name__]}
    if is_compressed(config):
        code = Path(__file__).with_name(REMOTE_CODE)
        shutil.copyfile(code, folder / code.name)
        settings["auto_map"] = {
            "AutoConfig": f"{code.stem}.{type(config).__name__}",
            "AutoModel": f"{code.stem}.{type(model).__name__}",
        }
    _write_config_and_weights(config, settings, _model_weights(model), folder)


def _write_ordinary(retriever: Retriever, folder: Path) -> None:
    """A compressed model as a smaller one of the plain architecture."""
    model, plan = retriever.model, retriever.plan
    plain = ordinary_config(model.config, plan)
    place = {layer: number for number, layer in enumerate(kept_blocks(plan))}
    prefix = retriever.family.blocks + "."
    weights = {}
    for name, tensor in _model_weights(model).items():
        if name.startswith(prefix):
            layer, _, inside = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{place[int(layer)]}.{inside}"
        weights[name] = tensor
    _write_config_and_weights(plain, {"architectures": [model_class(plain).__name__]}, weights, folder)


def _model_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Without the projection, which is no part of what AutoModel builds."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith(f"{NAME}.")}


def _write_config_and_weights(
    config: PreTrainedConfig, settings: dict[str, Any], weights: dict[str, Tensor], folder: Path
) -> None:
    with quiet_transformers():
        config.save_pretrained(folder)
    # Not model.save_pretrained: it imports DeepSpeed where that is installed, which prints and takes seconds.
    save_torch_state_dict(weights, folder, max_shard_size=MAX_SHARD)
    file = folder / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    for inherited in ("auto_map", *DROP_LISTS.values()):
        written.pop(inherited, None)
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.dtype.is_floating_point)
    _write_json(file, {**written, "dtype": str(dtype).removeprefix("torch."), **settings})


def _write_own(retriever: Retriever, folder: Path, ordinary: bool) -> None:
    neurons = {
        str(i): layer.neurons for i, layer in enumerate(retriever.plan.layers) if layer.neurons is not None
    }
    own: dict[str, Any] = {
        "format": 1,
        "backbone": retriever.name,
        "spec": retriever.spec.model_dump(),
        "neurons": neurons,
    }
    if ordinary:
        own["place"] = place_in_backbone(retriever.model.config, retriever.plan)
    (folder / OWN_FILE).write_text(json.dumps(own), encoding="utf-8")


def _write_sentence_transformers(retriever: Retriever, folder: Path) -> None:
    spec, hidden = retriever.spec, retriever.model.config.hidden_size
    projection = projection_of(retriever.model)
    kinds = ["Transformer", "Pooling", *["Dense"] * (projection is not None), *["Normalize"] * spec.normalize]
    places = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds[1:], start=1))]
    listed = [
        {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for index, (place, kind) in enumerate(zip(places, kinds, strict=True))
    ]
    _write_json(folder / "modules.json", listed)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": spec.max_length, "do_lower_case": False}
    )
    prompts = {"query": spec.query_prompt, "document": spec.document_prompt}
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if spec.normalize else "dot",
        },
    )
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "1_Pooling" / "config.json", _pooling_config(spec, hidden))
    if projection is not None:
        write_dense(projection, folder / "2_Dense")
    if spec.normalize:
        (folder / places[-1]).mkdir()


def _pooling_config(spec: RetrieverSpec, hidden: int) -> dict[str, Any]:
    chosen = _POOLING_NAMES[spec.pooling]
    flags = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    return {
        "word_embedding_dimension": hidden,
        **{f"pooling_mode_{flag}": name == chosen for name, flag in flags.items()},
        "include_prompt": True,
    }


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
