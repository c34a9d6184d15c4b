"""Encoding speed side by side with its peers: one process, one model, the same texts, interleaved rounds.

    python benchmarks/encode.py DATA --model minilm-l6 --documents 300            a BEIR folder, all cores
    python benchmarks/encode.py DATA --model minilm-l6 --documents 60 --threads 1 --rounds 3    a laptop

Compared: effir-ray (float32, int8), sentence-transformers, plain Transformers with padded batches, the same
under torch.compile, and ONNX Runtime and OpenVINO where they are installed (`pip install onnx onnxruntime
openvino`). Every row carries wall-clock and CPU seconds of each round; with --threads 1 CPU seconds stay
meaningful on a machine that others use too. Table and plot go to results/encoding/, named after model and
hardware.
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

import numpy as np

from effir_ray.errors import InputError

Encode = Callable[[list[str]], np.ndarray]
BATCH = 32  # texts a padded batch: the default of sentence-transformers


def contestants(retriever, chosen: list[str]) -> dict[str, Encode]:
    """Name -> texts to embeddings, all with the same weights, pooling and maximum length."""
    makers = {
        "effir-ray float32": lambda: effir_ray(retriever, None),
        "effir-ray int8": lambda: effir_ray(retriever, "int8"),
        "sentence-transformers": lambda: sentence_transformers(retriever),
        "transformers": lambda: transformers_padded(retriever, retriever.model),
        "transformers compiled": lambda: transformers_compiled(retriever),
        "onnxruntime": lambda: onnx_runtime(retriever),
        "openvino": lambda: openvino(retriever),
    }
    ready = {}
    for name in chosen or makers:
        try:
            ready[name] = makers[name]()
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return ready


def effir_ray(retriever, quantize) -> Encode:
    from effir_ray.retrieval.encoder import Encoder

    encoder = Encoder(retriever, quantize=quantize)
    return lambda texts: encoder.encode(texts, "document")


def sentence_transformers(retriever) -> Encode:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        retriever.model.save_pretrained(folder)
        retriever.tokenizer.save_pretrained(folder)
        module = Transformer(folder, max_seq_length=retriever.spec.max_length)
    mode = {"last": "lasttoken"}.get(retriever.spec.pooling, retriever.spec.pooling)
    parts = [module, Pooling(retriever.model.config.hidden_size, pooling_mode=mode)]
    model = SentenceTransformer(modules=parts + [Normalize()] * retriever.spec.normalize, device="cpu")
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
                )
                mask = batch["attention_mask"]
                hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
                rows.append(retriever.pool(hidden, mask).numpy())
        return np.concatenate(rows)

    return encode


def transformers_compiled(retriever) -> Encode:
    import torch

    return transformers_padded(retriever, torch.compile(retriever.model, dynamic=True))


def onnx_runtime(retriever) -> Encode:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with onnx_model(retriever) as path:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return exported(retriever, lambda inputs: session.run(None, inputs)[0])


def openvino(retriever) -> Encode:
    import openvino
    import torch

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where the processor has that
        "PERFORMANCE_HINT": "LATENCY",  # all threads for one batch
    }
    with onnx_model(retriever) as path:
        compiled = openvino.compile_model(path, "CPU", settings)
    return exported(retriever, lambda inputs: compiled(inputs)[0])


def exported(retriever, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Encode:
    """The padded loop around a model outside torch: ``run`` makes hidden states from ids and mask."""
    import torch

    class Output:
        def __init__(self, hidden) -> None:
            self.last_hidden_state = torch.from_numpy(hidden)

    def model(input_ids, attention_mask) -> Output:
        return Output(run({"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}))

    return transformers_padded(retriever, model)


@contextmanager
def onnx_model(retriever) -> Iterator[Path]:
    """Exported with torch.onnx: sentence-transformers' own ONNX and OpenVINO backends need optimum, which
    pins transformers below 5."""
    import onnx  # noqa: F401  # torch.onnx needs it and says so only while exporting
    import torch

    class Headless(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = retriever.model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = torch.ones(2, 9, dtype=torch.long)
    padded = example.tril(4)  # a mask of ones alone would be traced away, and padding then attended to
    names = ["input_ids", "attention_mask"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            Headless().eval(),  # the export puts the model back into the mode of this wrapper
            (example, padded),
            path,
            input_names=names,
            output_names=["hidden"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in [*names, "hidden"]},
            dynamo=False,
        )
        yield path


def measure(retriever, encoders: dict[str, Encode], texts: list[str], rounds: int) -> list[dict]:
    """A row a contestant and round: seconds, share of the GEMM peak, difference to the first contestant."""
    import torch

    from effir_ray.compression.accounting import flops
    from effir_ray.retrieval.efficiency import gemm_peak

    lengths = [len(ids) for ids in retriever.tokenize(texts, "document")]
    work = sum(flops(retriever.model.config, retriever.plan, length) for length in lengths)
    reference, rows = None, []
    for encode in encoders.values():  # warm-up: compilation, caches, thread pools
        encode(texts[:2])
    for number in range(rounds):
        for name, encode in encoders.items():
            peak = gemm_peak(clock=time.process_time) * torch.get_num_threads()
            wall, cpu = time.perf_counter(), time.process_time()
            embeddings = encode(texts)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            reference = embeddings if reference is None else reference
            rows.append(
                {
                    "contestant": name,
                    "round": number,
                    "documents": len(texts),
                    "tokens": sum(lengths),
                    "threads": torch.get_num_threads(),
                    "wall_seconds": wall,
                    "cpu_seconds": cpu,
                    "flops": float(work),
                    "gemm_peak": peak,
                    "peak_share": work / (cpu / torch.get_num_threads()) / peak,
                    "cosine_to_first": float((embeddings * reference).sum(axis=1).mean()),
                }
            )
            print(f"  round {number}: {name}: {wall:.1f} s, {cpu:.1f} CPU s", flush=True)
    return rows


def summary(rows: list[dict], clock: str) -> list[tuple[str, float, float, float, float]]:
    """(contestant, docs/s, speed against sentence-transformers, share of peak, cosine): medians."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    seconds = {n: np.array([r[clock] for r in rows if r["contestant"] == n]) for n in names}
    base = seconds.get("sentence-transformers", seconds[names[0]])
    found = []
    for name in names:
        mine = [row for row in rows if row["contestant"] == name]
        docs = mine[0]["documents"] / np.median(seconds[name])
        share = np.median([row["peak_share"] for row in mine])
        found.append((name, docs, np.median(base / seconds[name]), share, mine[-1]["cosine_to_first"]))
    return found


def plot(lines: list[tuple[str, float, float, float, float]], title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(lines) + 1.2), layout="constrained")
    names, ratios = [line[0] for line in lines][::-1], [line[2] for line in lines][::-1]
    axes.barh(names, ratios, color=["#1f77b4" if name.startswith("effir") else "#b0b0b0" for name in names])
    axes.bar_label(axes.containers[0], fmt="%.2fx", padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel("documents a second, relative to sentence-transformers")
    axes.set_title(title, fontsize=10)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a BEIR folder")
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--only", nargs="*", default=[], help="contestants to run; default: all")
    parser.add_argument("--out", type=Path, default=Path("results/encoding"))
    arguments = parser.parse_args()

    import pyarrow as pa
    import torch
    from pyarrow import parquet

    from effir_ray.backbones.retriever import load_retriever
    from effir_ray.hardware import detect
    from effir_ray.retrieval.datasets import load_dataset

    hardware = detect()
    torch.set_num_threads(arguments.threads or hardware.threads)
    dataset, retriever = load_dataset(arguments.data), load_retriever(arguments.model)
    texts = [d.document_text for d in dataset.corpus.iter_documents(0, arguments.documents)]
    rows = measure(retriever, contestants(retriever, arguments.only), texts, arguments.rounds)
    clock = "cpu_seconds" if torch.get_num_threads() == 1 else "wall_seconds"
    lines = summary(rows, clock)
    for name, docs, ratio, share, cosine in lines:
        print(f"{name:24} {docs:7.2f} docs/s {ratio:6.2f}x {share:6.0%} of GEMM peak, cosine {cosine:.4f}")
    about = {"model": arguments.model, "dataset": dataset.name, "hardware": hardware.name, "clock": clock}
    table = pa.Table.from_pylist([about | row for row in rows])
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{arguments.model} {hardware.name} {torch.get_num_threads()} threads"
    stem = arguments.out / re.sub(r"\W+", "-", name).strip("-").lower()
    parquet.write_table(table, f"{stem}.parquet")
    title = f"{arguments.model}, {len(texts)} {dataset.name} documents, {hardware.name}"
    plot(lines, title, Path(f"{stem}.svg"))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"encode: {error}")
