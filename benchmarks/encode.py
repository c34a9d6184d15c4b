"""Encoding throughput, in one run, contestants taking turns: the same model, real documents and real queries.

    python benchmarks/encode.py DATA --model smollm2-135m --documents 30 --rounds 3     DATA: a BEIR folder
    python benchmarks/encode.py DATA --model minilm-l6 --documents 60 --threads 1 --rounds 3    a laptop
    python benchmarks/encode.py DATA --model mistral-7b                                 a GPU with 80 GB

Compared: effir-ray, sentence-transformers, plain Transformers with padded batches and the same under
torch.compile; on CPUs also effir-ray in int8, and ONNX Runtime and OpenVINO where they are installed (`pip
install onnx onnxruntime openvino`). mistral-7b is its shape with random weights. Every row carries wall-clock
and CPU seconds of each round; with --threads 1 CPU seconds are what counts, which stay meaningful on a
machine that others use too. Table and plot go to results/encoding/, named after model and hardware.
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
PLURAL = {"document": "documents", "query": "queries"}
BATCH = 32  # texts a padded batch: the default of sentence-transformers


def contestants(retriever, chosen: list[str]) -> dict[str, Encode]:
    """Name -> texts to embeddings, all with the same weights, pooling and maximum length."""
    dtype = str(retriever.model.dtype).removeprefix("torch.")
    makers = {
        f"effir-ray {dtype}": lambda: effir_ray(retriever, None),
        "effir-ray int8": lambda: effir_ray(retriever, "int8"),
        "sentence-transformers": lambda: sentence_transformers(retriever),
        "transformers": lambda: transformers_padded(retriever, retriever.model),
        "transformers compiled": lambda: transformers_compiled(retriever),
        "onnxruntime": lambda: onnx_runtime(retriever),
        "openvino": lambda: openvino(retriever),
    }
    if retriever.model.device.type != "cpu":
        for name in ("effir-ray int8", "onnxruntime", "openvino"):
            del makers[name]
    ready = {}
    for name in chosen or makers:
        try:
            ready[name] = makers[name]()
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return ready


def effir_ray(retriever, quantize) -> Encode:
    from effir_ray.encoding.encoder import Encoder

    encoder = Encoder(retriever, quantize=quantize)
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


def measure(
    retriever, encoders: dict[str, Encode], texts: dict[str, list[str]], rounds: int
) -> list[dict[str, Any]]:
    """A row a contestant, kind of text and round: seconds, FLOPs, difference to the first contestant."""
    import torch

    from effir_ray.encoding.gemm_peak import gemm_peak
    from effir_ray.models.accounting import flops

    lengths = {kind: [len(ids) for ids in retriever.tokenize(part, kind)] for kind, part in texts.items()}
    reference: dict[str, np.ndarray] = {}
    rows = []
    for encode in encoders.values():  # warm-up: compilation, caches, thread pools
        for part in texts.values():
            encode(part[:BATCH])
    model, threads = retriever.model, torch.get_num_threads()
    for number in range(rounds):
        for name, encode in encoders.items():
            peaks = {
                "gemm_peak": gemm_peak(model.device, model.dtype),
                "gemm_peak_cpu_time": gemm_peak(model.device, model.dtype, clock=time.process_time) * threads,
            }
            for kind, part in texts.items():
                wall, cpu = time.perf_counter(), time.process_time()
                embeddings = encode(part)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                cosines = (embeddings * reference.setdefault(kind, embeddings)).sum(axis=1)
                rows.append(
                    {
                        "contestant": name,
                        "kind": kind,
                        "round": number,
                        "texts": len(part),
                        "tokens": sum(lengths[kind]),
                        "threads": threads,
                        "wall_seconds": wall,
                        "cpu_seconds": cpu,
                        "flops": float(sum(flops(model.config, retriever.plan, n) for n in lengths[kind])),
                        "cosine_to_first": float(cosines.mean()),
                    }
                    | peaks
                )
                print(f"  round {number}: {name}, {kind}: {wall:.1f} s, {cpu:.1f} CPU s", flush=True)
    return rows


Line = tuple[str, float, float, float, float]


def summary(rows: list[dict[str, Any]], kind: str, by_cpu_time: bool) -> list[Line]:
    """(contestant, texts/s, speed against sentence-transformers, share of peak, cosine).

    Speeds are medians. The share holds the fastest round against the highest peak of the run: other work on
    the machine only lowers either.
    """
    rows = [row for row in rows if row["kind"] == kind]
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    clock = "cpu_seconds" if by_cpu_time else "wall_seconds"
    peak = max(row["gemm_peak_cpu_time" if by_cpu_time else "gemm_peak"] for row in rows)
    seconds = {n: np.array([r[clock] for r in rows if r["contestant"] == n]) for n in names}
    base = seconds.get("sentence-transformers", seconds[names[0]])
    found = []
    for name in names:
        last = next(row for row in reversed(rows) if row["contestant"] == name)
        usual = float(np.median(seconds[name]))
        share = last["flops"] / (seconds[name].min() / (last["threads"] if by_cpu_time else 1)) / peak
        ratio = float(np.median(base / seconds[name]))
        found.append((name, last["texts"] / usual, ratio, share, last["cosine_to_first"]))
    return found


def plot(lines: dict[str, list[Line]], title: str, path: Path) -> None:
    from matplotlib import pyplot

    height = 0.45 * max(map(len, lines.values())) + 1.2
    figure, panels = pyplot.subplots(1, len(lines), figsize=(9, height), sharey=True, layout="constrained")
    for axes, (kind, found) in zip(panels, lines.items(), strict=True):
        names, ratios = [line[0] for line in found][::-1], [line[2] for line in found][::-1]
        axes.barh(
            names, ratios, color=["#1f77b4" if name.startswith("effir") else "#b0b0b0" for name in names]
        )
        axes.bar_label(axes.containers[0], fmt="%.2fx", padding=3)
        axes.margins(x=0.2)
        axes.set_xlabel(f"{PLURAL[kind]} a second, sentence-transformers = 1")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def load(name: str):
    """A retriever on this machine's device, in the type that it computes in there."""
    from effir_ray.hardware import detect
    from effir_ray.models.retriever import load_retriever

    if name == "mistral-7b":
        from speedup import random_backbone

        return random_backbone(shrink=1)
    return load_retriever(name, dtype=detect().dtype, device=detect().device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a BEIR folder")
    parser.add_argument("--model", default="minilm-l6", help="any name that effir-ray loads, or mistral-7b")
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--only", nargs="*", default=[], help="contestants to run; default: all")
    parser.add_argument("--out", type=Path, default=Path("results/encoding"))
    arguments = parser.parse_args()

    import pyarrow as pa
    import torch
    from pyarrow import parquet

    from effir_ray.data.datasets import load_dataset
    from effir_ray.hardware import detect

    hardware = detect()
    torch.set_num_threads(arguments.threads or hardware.threads)
    dataset, retriever = load_dataset(arguments.data), load(arguments.model)
    texts = {
        "document": [d.document_text for d in dataset.corpus.iter_documents(0, arguments.documents)],
        "query": list(dataset.queries("test").values())[: arguments.queries],
    }
    rows = measure(retriever, contestants(retriever, arguments.only), texts, arguments.rounds)
    by_cpu_time = hardware.device == "cpu" and torch.get_num_threads() == 1
    lines = {kind: summary(rows, kind, by_cpu_time) for kind in texts}
    for kind, found in lines.items():
        for name, speed, ratio, share, cosine in found:
            print(
                f"{name:24} {speed:8.2f} {PLURAL[kind]}/s {ratio:6.2f}x {share:6.0%} of GEMM peak, "
                f"cosine {cosine:.4f}"
            )
    about = {"model": arguments.model, "dataset": dataset.name, "hardware": hardware.name}
    table = pa.Table.from_pylist([about | row for row in rows])
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"{arguments.model} {hardware.name} {torch.get_num_threads()} threads"
    stem = arguments.out / re.sub(r"\W+", "-", name).strip("-").lower()
    parquet.write_table(table, f"{stem}.parquet")
    title = f"{arguments.model}, {dataset.name}, {hardware.name}"
    plot(lines, title, Path(f"{stem}.svg"))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"encode: {error}")
