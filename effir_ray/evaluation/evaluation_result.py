"""What an evaluation measured, and the files it leaves for other tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effir_ray.evaluation.feedback import Feedback
from effir_ray.evaluation.metrics import Run, Scores
from effir_ray.evaluation.trec import write_run
from effir_ray.files import write_whole


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measured. ``search_ms``: finding the documents of all queries at once,
    with reading the stored embeddings, milliseconds a query.
    """

    model: str
    dataset: str
    split: str
    fingerprint: str  # of the data set
    scores: Scores
    run: Run
    n_queries: int
    n_documents: int
    seconds: float
    search_ms: float
    feedback: Feedback | None
    warnings: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the run and the scores of single queries."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "split": self.split,
            "scores": self.scores.mean,
            "n_queries": self.n_queries,
            "n_documents": self.n_documents,
            "seconds": self.seconds,
            "search_ms": self.search_ms,
            "feedback": self.feedback.model_dump() if self.feedback else None,
            "warnings": list(self.warnings),
        }

    def mteb_result(self) -> dict[str, Any]:
        """The same in the JSON form of an MTEB task result."""
        names = {metric: metric.replace("@", "_at_") for metric in self.scores.mean}
        scores = {names[metric]: value for metric, value in self.scores.mean.items()}
        return {
            "dataset_revision": self.fingerprint,
            "task_name": self.dataset,
            "mteb_version": None,
            "scores": {
                self.split: [
                    {
                        **scores,
                        "main_score": scores["ndcg_at_10"],
                        "hf_subset": "default",
                        "languages": ["eng-Latn"],
                    }
                ]
            },
            "evaluation_time": self.seconds,
            "kg_co2_emissions": None,
        }


def write_evaluation(evaluation: Evaluation, out: Path) -> None:
    """Write ``run.trec``, ``mteb.json``, ``per_query.json`` and ``evaluation.json`` into ``out``."""
    write_run(evaluation.run, out / "run.trec", tag=evaluation.model)
    files = {
        "mteb.json": evaluation.mteb_result(),
        "per_query.json": evaluation.scores.per_query,
        "evaluation.json": evaluation.summary(),
    }
    for name, content in files.items():
        write_whole(out / name, json.dumps(content, indent=2))
