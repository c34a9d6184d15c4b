"""Small search spaces and rows for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effir_ray.results.schema import TrialRow
from effir_ray.search.space import SearchSpace
from effir_ray.search.trial_config import TrialConfig


def small_space(**changes: Any) -> SearchSpace:
    """Tiny random backbone; four layers; nothing is trained unless asked for."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "backbone": "random:llama",
        "dataset": "stdlib",
        "dev": {"queries": 8, "documents": 24},
        "test": {"queries": 8, "documents": 24},
        "query_max_length": 16,
        "document_max_length": 32,
        "calibration_texts": 8,
        "gates": {"steps": 2, "pairs": 16, "batch_size": 4},
        "timing": {"queries": 4, "documents": 4, "rounds": 1},
        "threads": 1,
    }
    if "backbones" in changes:
        del settings["backbone"]
    return SearchSpace(**(settings | changes))


def row(
    config: TrialConfig, ndcg: float | None, *, split: str = "dev", parameters: int = 100, speed: float = 1.0
) -> TrialRow:
    """A row as a trial would write it; ``ndcg`` None makes a failed one."""
    measured = {"ndcg_at_10": ndcg, "parameters": parameters, "document_speedup": speed}
    outcome = {"status": "failed", "reason": "no luck"} if ndcg is None else measured
    return TrialRow(
        study="tiny",
        trial_id=config.id,
        trial=config.model_dump_json(),
        schedule=config.name,
        backbone=config.backbone,
        dataset=config.measured_on,
        seed=config.seed,
        split=split,
        **outcome,
    )


def write_corpus(folder: Path) -> Path:
    """A BEIR folder in which query i shares its words with document i; train, dev and test splits."""
    words = [
        f"{a} {b}"
        for a in ("red", "green", "blue", "dark", "pale", "warm")
        for b in ("car", "tree", "sky", "hat")
    ]
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as queries:
        for number, text in enumerate(words):
            corpus.write(json.dumps({"_id": f"d{number}", "title": "", "text": f"here is the {text}"}) + "\n")
            queries.write(json.dumps({"_id": f"q{number}", "text": f"find {text}"}) + "\n")
    for place, split in enumerate(("train", "dev", "test")):
        lines = [f"q{number}\td{number}\t1" for number in range(8 * place, 8 * place + 8)]
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder
