"""Encoding speed, contestants taking turns: the same model, real documents, real queries one by one.

    python benchmarks/encode.py DATA --model minilm-l6 --documents 200 --rounds 5     DATA: a BEIR folder
    python benchmarks/encode.py DATA --model smollm2-135m --documents 30 --rounds 3
    python benchmarks/encode.py DATA --model minilm-l6 --ndcg effir-ray openvino      scores of all queries
    python benchmarks/encode.py DATA --model mistral-7b                               a GPU with 80 GB

Compared, on CPUs: effir-ray in its three types, sentence-transformers, plain Transformers (padded, compiled,
compiled under autocast to bfloat16), and ONNX Runtime (float32, dynamic int8) and OpenVINO (as it comes,
which is bfloat16 where the processor has that; float32; nncf's static int8), where they are installed: `pip
install onnx onnxruntime openvino nncf`. Exported models take batches of 16 ordered by length. mistral-7b is
its shape with random weights. Table and plot go to results/encoding/, named after model and hardware.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from effir_ray.errors import InputError

Encode = Callable[[list[str]], np.ndarray]
BATCH = 32  # texts a padded batch: the default of sentence-transformers
EXPORTED_BATCH = 16
CALIBRATION = 60  # texts


def contestants(retriever, chosen: list[str], calibration: list[str]) -> dict[str, Encode]:
    """Name -> texts to embeddings, all with the same weights, pooling and maximum length. ``chosen``: names,
    or what they begin with; all without any."""
    on_cpu = retriever.model.device.type == "cpu"
    makers = {
        f"effir-ray {precision}": lambda precision=precision: effir_ray(retriever, precision)
        for precision in (("float32", "bfloat16", "int8") if on_cpu else (None,))
    }
    makers |= {
        "sentence-transformers": lambda: sentence_transformers(retriever),
        "transformers": lambda: transformers_padded(retriever, retriever.model),
        "transformers compiled": lambda: transformers_compiled(retriever),
    }
    if on_cpu:
        makers |= {
            "transformers compiled bfloat16": lambda: autocast(transformers_compiled(retriever)),
            "onnxruntime": lambda: onnx_runtime(retriever),
            "onnxruntime int8": lambda: onnx_runtime(retriever, quantize=True),
            "openvino float32": lambda: openvino(retriever, {"INFERENCE_PRECISION_HINT": "f32"}),
            "openvino": lambda: openvino(retriever, {}),
            "openvino int8": lambda: openvino(retriever, {}, calibration),
        }
    ready = {}
    for name in makers:
        if chosen and not any(name.startswith(start) for start in chosen):
            continue
        try:
            ready[name] = makers[name]()
        except (ImportError, InputError) as error:
            print(f"{name}: left out ({error})")
    return ready


def precision_of(name: str, default: str) -> str:
    """What a contestant multiplies in, by its name."""
    if name == "openvino":
        return detected().precision
    return next((kind for kind in ("float32", "bfloat16", "int8") if kind in name), default)


def detected():
    from effir_ray.hardware import detect

    return detect()


def effir_ray(retriever, precision) -> Encode:
    from effir_ray.encoding.encoder import Encoder

    encoder = Encoder(retriever, precision=precision)
    return lambda texts: encoder.encode(texts, "document")


def sentence_transformers(retriever) -> Encode:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        retriever.model.save_pretrained(folder)
        retriever.tokenizer.save_pretrained(folder)
        module = Transformer(
            folder, max_seq_length=retriever.spec.max_length, model_args={"dtype": retriever.model.dtype}
        )
    mode = {"last": "lasttoken"}.get(retriever.spec.pooling, retriever.spec.pooling)
    parts = [module, Pooling(retriever.model.config.hidden_size, pooling_mode=mode)]
    model = SentenceTransformer(
        modules=parts + [Normalize()] * retriever.spec.normalize, device=str(retriever.model.device)
    )
    return lambda texts: model.encode(texts, batch_size=BATCH, show_progress_bar=False)


def transformers_padded(retriever, model) -> Encode:
    """The usual loop: batches in the given order, padded to their longest text."""
    import torch

    tokenizer = retriever.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(texts: list[str]) -> np.ndarray:
        rows = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                batch = tokenizer(
                    texts[start : start + BATCH],
                    truncation=True,
                    max_length=retriever.spec.max_length,
                    padding=True,
                    return_tensors="pt",
                ).to(retriever.model.device)
                mask = batch["attention_mask"]
                hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
                rows.append(retriever.pool(hidden, mask).float().cpu().numpy())
        return np.concatenate(rows)

    return encode


def transformers_compiled(retriever) -> Encode:
    import torch

    return transformers_padded(retriever, torch.compile(retriever.model, dynamic=True))


def autocast(encode: Encode) -> Encode:
    import torch

    def under(texts: list[str]) -> np.ndarray:
        with torch.autocast("cpu", torch.bfloat16):
            return encode(texts)

    return under


def onnx_runtime(retriever, quantize: bool = False) -> Encode:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with onnx_model(retriever) as path:
        if quantize:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(path, path.with_name("int8.onnx"), weight_type=QuantType.QInt8)
            path = path.with_name("int8.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return exported(retriever, lambda inputs: session.run(None, inputs)[0])


def openvino(retriever, settings: dict[str, Any], calibration: list[str] | None = None) -> Encode:
    import openvino
    import torch

    try:
        names = ("input_ids", "attention_mask")
        example = dict(zip(names, example_batch(), strict=True))
        model = openvino.convert_model(embedder(retriever), example_input=example)
    except Exception as error:  # what its front end does not know has no type of its own
        print(f"OpenVINO reads the model from ONNX: {str(error).splitlines()[0][:80]}")
        with onnx_model(retriever) as path:
            model = openvino.Core().read_model(path)
    if calibration:
        import nncf

        items = [batch for _, batch in ordered_batches(retriever, calibration, 1)]
        kind = nncf.ModelType.TRANSFORMER
        model = nncf.quantize(model, nncf.Dataset(items), model_type=kind, subset_size=len(items))
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(model, "CPU", threads | settings)
    return exported(retriever, lambda inputs: compiled(inputs)[0])


def ordered_batches(
    retriever, texts: list[str], size: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """(indices of texts, ids and mask) of batches of similar length, padded to their longest."""
    tokens = retriever.tokenize(texts, "document")
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        ids = np.zeros((len(batch), len(tokens[batch[0]])), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, : len(tokens[index])] = tokens[index]
            mask[row, : len(tokens[index])] = 1
        yield batch, {"input_ids": ids, "attention_mask": mask}


def exported(retriever, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Encode:
    """The loop around a model outside torch: ``run`` makes embeddings from ids and mask."""

    def encode(texts: list[str]) -> np.ndarray:
        out = np.empty((len(texts), retriever.model.config.hidden_size), dtype=np.float32)
        for batch, inputs in ordered_batches(retriever, texts, EXPORTED_BATCH):
            out[batch] = run(inputs)
        return out

    return encode


def embedder(retriever):
    """Ids and mask to pooled embeddings, as a module; its mode is what an export puts the model back into."""
    import torch

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = retriever.model

        def forward(self, input_ids, attention_mask):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return retriever.pool(hidden, attention_mask)

    return Embedder().eval()


def example_batch():
    """Ids and a mask. One of ones alone would be traced away, and padding then attended to."""
    import torch

    ids = torch.ones(2, 9, dtype=torch.long)
    return ids, ids.tril(4)


@contextmanager
def onnx_model(retriever) -> Iterator[Path]:
    """Exported with torch.onnx: sentence-transformers' own ONNX and OpenVINO backends need optimum, which
    pins transformers below 5."""
    import onnx  # noqa: F401  # torch.onnx needs it and says so only while exporting
    import torch

    names = ["input_ids", "attention_mask"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            embedder(retriever),
            example_batch(),
            path,
            input_names=names,
            output_names=["embedding"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names} | {"embedding": {0: "batch"}},
            dynamo=False,
        )
        yield path


def measure(
    retriever, encoders: dict[str, Encode], documents: list[str], queries: list[str], rounds: int
) -> list[dict[str, Any]]:
    """A row a contestant, kind of text and round: seconds, FLOPs, cosine to the first contestant. Documents
    are encoded together, queries one by one, tokenisation included."""
    import torch

    from effir_ray.encoding.gemm_peak import gemm_peak
    from effir_ray.models.accounting import flops

    model = retriever.model
    own = str(model.dtype).removeprefix("torch.")
    texts = {"document": documents, "query": queries}
    lengths = {kind: [len(ids) for ids in retriever.tokenize(part, kind)] for kind, part in texts.items()}
    work = {
        kind: float(sum(flops(model.config, retriever.plan, n) for n in of)) for kind, of in lengths.items()
    }
    reference: dict[str, np.ndarray] = {}
    rows = []
    for encode in encoders.values():  # warm-up: compilation, caches, thread pools
        encode(documents[:BATCH])
        for query in queries[:BATCH]:
            encode([query])
    for number in range(rounds):
        for name, encode in encoders.items():
            precision = precision_of(name, own)
            for kind, part in texts.items():
                groups = [[text] for text in part] if kind == "query" else [part]
                seconds, found = [], []
                for group in groups:
                    started = time.perf_counter()
                    found.append(encode(group))
                    seconds.append(time.perf_counter() - started)
                embeddings = np.concatenate(found)
                embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
                cosines = (embeddings * reference.setdefault(kind, embeddings)).sum(axis=1)
                rows.append(
                    {
                        "contestant": name,
                        "precision": precision,
                        "kind": kind,
                        "round": number,
                        "texts": len(part),
                        "tokens": sum(lengths[kind]),
                        "threads": torch.get_num_threads(),
                        "wall_seconds": sum(seconds),
                        "p50_ms": 1000 * float(np.quantile(seconds, 0.5)) if kind == "query" else None,
                        "p95_ms": 1000 * float(np.quantile(seconds, 0.95)) if kind == "query" else None,
                        "flops": work[kind],
                        "gemm_peak": gemm_peak(model.device, precision),
                        "cosine_to_first": float(cosines.mean()),
                        "lowest_cosine": float(cosines.min()),
                    }
                )
                speed = len(part) / sum(seconds)
                print(
                    f"  round {number}: {name}, {kind}: {speed:.1f}/s, cosine {cosines.mean():.5f}",
                    flush=True,
                )
    return rows


Line = tuple[str, float, float, float, str]


def summary(rows: list[dict[str, Any]], kind: str) -> list[Line]:
    """(contestant, texts/s, speed against sentence-transformers, share of peak, the rest as text).

    Speeds are medians, ratios medians of ratios within rounds. The share holds the fastest round against the
    highest peak of the run: other work on the machine only lowers either.
    """
    rows = [row for row in rows if row["kind"] == kind]
    of = {
        name: [r for r in rows if r["contestant"] == name]
        for name in dict.fromkeys(r["contestant"] for r in rows)
    }
    seconds = {name: np.array([row["wall_seconds"] for row in found]) for name, found in of.items()}
    base = seconds.get("sentence-transformers", next(iter(seconds.values())))
    peaks: dict[str, float] = {}
    for row in rows:
        peaks[row["precision"]] = max(row["gemm_peak"], peaks.get(row["precision"], 0.0))
    lines = []
    for name, found in of.items():
        last, taken = found[-1], seconds[name]
        speeds = last["texts"] / taken
        about = f"{speeds.min():.1f} to {speeds.max():.1f}/s, cosine {last['cosine_to_first']:.5f}"
        about += f" (lowest {last['lowest_cosine']:.5f})"
        if kind == "query":
            p50, p95 = (float(np.median([row[key] for row in found])) for key in ("p50_ms", "p95_ms"))
            about = f"p50 {p50:.2f} ms, p95 {p95:.2f} ms, " + about
        share = last["flops"] / taken.min() / peaks[last["precision"]]
        lines.append((name, float(np.median(speeds)), float(np.median(base / taken)), share, about))
    return lines


def ndcg(encoders: dict[str, Encode], dataset) -> list[dict[str, Any]]:
    """nDCG@10 of each contestant on the whole test set, by the same exact search."""
    from effir_ray.evaluation.index import exact_search
    from effir_ray.evaluation.metrics import score_run

    ids = list(dataset.corpus.ids)
    texts = [document.document_text for document in dataset.corpus.iter_documents(0, len(ids))]
    queries, qrels = dataset.queries("test"), dataset.qrels("test")
    rows = []
    for name, encode in encoders.items():
        scores, found = exact_search(encode(list(queries.values())), encode(texts), k=100)
        run = {
            query: {ids[i]: float(s) for i, s in zip(row, values, strict=True)}
            for query, row, values in zip(queries, found, scores, strict=True)
        }
        rows.append({"contestant": name, "ndcg_at_10": score_run(run, qrels).mean["ndcg@10"]})
        print(f"{name:32} nDCG@10 {rows[-1]['ndcg_at_10']:.4f}", flush=True)
    return rows


def plot(lines: dict[str, list[Line]], title: str, path: Path) -> None:
    from matplotlib import pyplot

    height = 0.32 * max(map(len, lines.values())) + 1.2
    figure, panels = pyplot.subplots(1, len(lines), figsize=(10, height), sharey=True, layout="constrained")
    words = {"document": "documents a second", "query": "single queries a second"}
    for axes, (kind, found) in zip(panels, lines.items(), strict=True):
        names, ratios = [line[0] for line in found][::-1], [line[2] for line in found][::-1]
        axes.barh(names, ratios, color=["#1f77b4" if n.startswith("effir") else "#b0b0b0" for n in names])
        axes.bar_label(axes.containers[0], fmt="%.2fx", padding=3)
        axes.margins(x=0.2)
        axes.set_xlabel(f"{words[kind]}, sentence-transformers = 1")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def load(name: str):
    """A retriever on this machine's device, in the type that it computes in there."""
    from effir_ray.models.retriever import load_retriever

    if name == "mistral-7b":
        from speedup import random_backbone

        return random_backbone(shrink=1)
    return load_retriever(name, dtype=detected().dtype, device=detected().device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a BEIR folder")
    parser.add_argument("--model", default="minilm-l6", help="any name that effir-ray loads, or mistral-7b")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument(
        "--only", nargs="*", default=[], help="what names of contestants begin with; default: all"
    )
    parser.add_argument("--ndcg", nargs="*", help="score these contestants on the whole test set instead")
    parser.add_argument("--out", type=Path, default=Path("results/encoding"))
    arguments = parser.parse_args()

    import pyarrow as pa
    import torch
    from pyarrow import parquet

    from effir_ray.data.datasets import load_dataset

    hardware = detected()
    torch.set_num_threads(arguments.threads or hardware.threads)
    dataset, retriever = load_dataset(arguments.data), load(arguments.model)
    last = len(dataset.corpus)
    calibration = [d.document_text for d in dataset.corpus.iter_documents(last - CALIBRATION, last)]
    chosen = arguments.only if arguments.ndcg is None else arguments.ndcg
    encoders = contestants(retriever, chosen, calibration)
    name = f"{arguments.model} {hardware.name} {torch.get_num_threads()} threads"
    stem = arguments.out / re.sub(r"\W+", "-", name).strip("-").lower()
    about = {"model": arguments.model, "dataset": dataset.name, "hardware": hardware.name}
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.ndcg is not None:
        table = pa.Table.from_pylist([about | row for row in ndcg(encoders, dataset)])
        parquet.write_table(table, f"{stem}-ndcg.parquet")
        return
    documents = [d.document_text for d in dataset.corpus.iter_documents(0, arguments.documents)]
    queries = list(dataset.queries("test").values())[: arguments.queries]
    rows = measure(retriever, encoders, documents, queries, arguments.rounds)
    lines = {kind: summary(rows, kind) for kind in ("document", "query")}
    for kind, found in lines.items():
        print(f"\n{kind}")
        for contestant, speed, ratio, share, rest in found:
            print(f"{contestant:32} {speed:8.1f}/s {ratio:6.2f}x {share:5.0%} of peak, {rest}")
    parquet.write_table(pa.Table.from_pylist([about | row for row in rows]), f"{stem}.parquet")
    title = f"{arguments.model}, {dataset.name}, {hardware.name}"
    plot(lines, title, Path(f"{stem}.svg"))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"encode: {error}")
