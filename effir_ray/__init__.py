"""Finds the smallest and fastest dense retriever hidden in a language model.

The verbs of the command line are functions here, loaded when first used::

    import effir_ray

    effir_ray.compress("smollm2-135m", effir_ray.Schedule(drop_mlp=4), Path("small"))
    effir_ray.evaluate("small", "stdlib", split="dev").scores.mean["ndcg@10"]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from effir_ray.provenance import __version__

if TYPE_CHECKING:
    from effir_ray.cluster.jobs import follow_job, job_logs, list_jobs, stop_job
    from effir_ray.compression.analysis.analyze import analyze
    from effir_ray.compression.pipeline import compress
    from effir_ray.compression.quantization import measure_size, quantize
    from effir_ray.compression.schedule import Calibration, GateTraining, Schedule
    from effir_ray.data.datasets import load_dataset
    from effir_ray.data.download import get as get_dataset
    from effir_ray.data.download import list_datasets
    from effir_ray.demo import run_demo
    from effir_ray.doctor import diagnose
    from effir_ray.encoding.corpus_encoding import encode_corpus as encode
    from effir_ray.encoding.encoder import Encoder
    from effir_ray.errors import InputError, LostProcess, TrialFailure
    from effir_ray.evaluation.efficiency import measure
    from effir_ray.evaluation.evaluate import evaluate
    from effir_ray.evaluation.mteb_adapter import run_mteb
    from effir_ray.models.plan import Plan
    from effir_ray.models.retriever import load_retriever as load
    from effir_ray.results.comparison import compare
    from effir_ray.results.export import export
    from effir_ray.results.fetch import fetch_results
    from effir_ray.results.query import query
    from effir_ray.results.report import report
    from effir_ray.results.results import Results
    from effir_ray.results.selection import pareto
    from effir_ray.search.dry_run import dry_run as preview_search
    from effir_ray.search.space import SearchSpace
    from effir_ray.search.study import clean, submit_search
    from effir_ray.search.study import search as run_search
    from effir_ray.search.trial import repeat
    from effir_ray.shrinking import shrink
    from effir_ray.training.config import TrainConfig
    from effir_ray.training.run.launcher import train
    from effir_ray.training.supervision.annotate import annotate
    from effir_ray.training.supervision.negatives import mine

_PUBLIC = {
    "Calibration": "compression.schedule:Calibration",
    "Encoder": "encoding.encoder:Encoder",
    "GateTraining": "compression.schedule:GateTraining",
    "InputError": "errors:InputError",
    "LostProcess": "errors:LostProcess",
    "Plan": "models.plan:Plan",
    "Results": "results.results:Results",
    "Schedule": "compression.schedule:Schedule",
    "SearchSpace": "search.space:SearchSpace",
    "TrainConfig": "training.config:TrainConfig",
    "TrialFailure": "errors:TrialFailure",
    "analyze": "compression.analysis.analyze:analyze",
    "annotate": "training.supervision.annotate:annotate",
    "clean": "search.study:clean",
    "compare": "results.comparison:compare",
    "compress": "compression.pipeline:compress",
    "diagnose": "doctor:diagnose",
    "encode": "encoding.corpus_encoding:encode_corpus",
    "evaluate": "evaluation.evaluate:evaluate",
    "export": "results.export:export",
    "fetch_results": "results.fetch:fetch_results",
    "follow_job": "cluster.jobs:follow_job",
    "get_dataset": "data.download:get",
    "job_logs": "cluster.jobs:job_logs",
    "list_datasets": "data.download:list_datasets",
    "list_jobs": "cluster.jobs:list_jobs",
    "load": "models.retriever:load_retriever",
    "load_dataset": "data.datasets:load_dataset",
    "measure": "evaluation.efficiency:measure",
    "measure_size": "compression.quantization:measure_size",
    "mine": "training.supervision.negatives:mine",
    "pareto": "results.selection:pareto",
    "preview_search": "search.dry_run:dry_run",
    "quantize": "compression.quantization:quantize",
    "query": "results.query:query",
    "repeat": "search.trial:repeat",
    "report": "results.report:report",
    "run_demo": "demo:run_demo",
    "run_mteb": "evaluation.mteb_adapter:run_mteb",
    "run_search": "search.study:search",
    "shrink": "shrinking:shrink",
    "stop_job": "cluster.jobs:stop_job",
    "submit_search": "search.study:submit_search",
    "train": "training.run.launcher:train",
}
"""Name -> where it lives. (`effir_ray.search` and `.demo` are modules, hence `run_search` and `run_demo`.)"""

__all__ = [
    "Calibration",
    "Encoder",
    "GateTraining",
    "InputError",
    "LostProcess",
    "Plan",
    "Results",
    "Schedule",
    "SearchSpace",
    "TrainConfig",
    "TrialFailure",
    "__version__",
    "analyze",
    "annotate",
    "clean",
    "compare",
    "compress",
    "diagnose",
    "encode",
    "evaluate",
    "export",
    "fetch_results",
    "follow_job",
    "get_dataset",
    "job_logs",
    "list_datasets",
    "list_jobs",
    "load",
    "load_dataset",
    "measure",
    "measure_size",
    "mine",
    "pareto",
    "preview_search",
    "quantize",
    "query",
    "repeat",
    "report",
    "run_demo",
    "run_mteb",
    "run_search",
    "shrink",
    "stop_job",
    "submit_search",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562): `import effir_ray` stays fast."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'effir_ray' has no attribute '{name}'")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(f"effir_ray.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
