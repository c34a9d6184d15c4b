"""``python tests/outside/embed.py TASKS.json``: embed texts with exported models where there is no effir-ray.

TASKS.json is a list of {"folder", "out", "texts", "remote_code"}. Each ``out`` becomes an .npz file with what
AutoTokenizer, AutoModel and SentenceTransformer make of the texts: ``ids`` and ``mask`` (texts, tokens),
``hidden`` (texts, tokens, width), ``query`` and ``document`` (texts, width); with "only": "sentences" just
the last two. "onnx" names an ONNX file of the model: ``onnx_query`` and ``onnx_document`` are what
onnxruntime makes of it. "judged", {"corpus", "queries", "qrels"}, is what mteb scores it on as its task
SciFact: ``ndcg_at_10``.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

assert importlib.util.find_spec("effir_ray") is None, "effir-ray must not be importable here"


def onnx(file: str, folder: str, texts: list[str], limit: int) -> np.ndarray:
    """Without torch or transformers: the tokenizer's file and the model's, 32 texts at a time."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_padding()
    tokenizer.enable_truncation(limit)
    session = onnxruntime.InferenceSession(file)
    found = []
    for start in range(0, len(texts), 32):
        batch = tokenizer.encode_batch(texts[start : start + 32])
        ids, mask = (np.array([getattr(text, name) for text in batch]) for name in ("ids", "attention_mask"))
        found.append(session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0])
    return np.concatenate(found)


def mteb_score(model: SentenceTransformer, judged: dict[str, Any]) -> float:
    import mteb

    task = mteb.get_task("SciFact")
    task.corpus = {"test": judged["corpus"]}
    task.queries = {"test": judged["queries"]}
    task.relevant_docs = {"test": judged["qrels"]}
    task.data_loaded = True
    found = mteb.evaluate(model, [task], cache=None, show_progress_bar=False)
    return float(found.task_results[0].get_score())  # of the main score, nDCG@10


def embed(task: dict[str, Any]) -> dict[str, np.ndarray]:
    folder, texts, trust = task["folder"], task["texts"], task["remote_code"]
    sentences = SentenceTransformer(folder, trust_remote_code=trust, device="cpu")
    found = {
        "query": sentences.encode_query(texts["query"], batch_size=32),
        "document": sentences.encode_document(texts["document"], batch_size=32),
    }
    if "onnx" in task:
        limit = sentences.max_seq_length
        found |= {f"onnx_{kind}": onnx(task["onnx"], folder, texts[kind], limit) for kind in texts}
    if "judged" in task:
        found["ndcg_at_10"] = np.array(mteb_score(sentences, task["judged"]))
    if task.get("only") == "sentences":
        return found
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    batch = tokenizer(texts["document"], padding=True, truncation=True, max_length=24, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()
    with torch.inference_mode():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = model(**inputs).last_hidden_state
    parts = {"ids": batch["input_ids"], "mask": batch["attention_mask"], "hidden": hidden}
    return found | {name: part.numpy() for name, part in parts.items()}


for task in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    np.savez(task["out"], **embed(task))
assert not any(name.split(".")[0] == "effir_ray" for name in sys.modules)
