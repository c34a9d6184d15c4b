"""Efficiency figures: what they mean, not how large they are."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from effir_ray.compression.surgery import apply_plan
from effir_ray.encoding import gemm_peak
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.evaluation import efficiency
from effir_ray.evaluation.efficiency import isotropy, measure, measure_efficiency, median_interval
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import load_retriever

TEXTS = [f"the study of cells number {i} " + "and data " * (i % 7) for i in range(20)]


def test_isotropy_is_the_mean_pairwise_cosine():
    rows = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = units @ units.T
    mean = pytest.approx(cosines[~np.eye(9, dtype=bool)].mean(), abs=1e-6)
    assert isotropy([rows]) == isotropy(iter([rows[:4], rows[4:]])) == mean
    assert isotropy([np.ones((4, 3), dtype=np.float32)]) == pytest.approx(1)
    with pytest.raises(InputError, match="at least 2"):
        isotropy([rows[:1]])


def test_the_interval_of_a_median_holds_it_in_95_of_100_samples():
    draw = np.random.default_rng(1)
    for n in (6, 9, 15, 40):
        samples = draw.exponential(size=(2000, n))
        inside = [low <= np.log(2) <= high for low, high in map(median_interval, samples)]
        assert 0.94 <= np.mean(inside) <= 0.99
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_rounds_end_when_the_speed_up_is_known_well_enough(monkeypatch):
    """Both texts a round: six rounds at least, all of them where nothing is good enough."""
    monkeypatch.setitem(gemm_peak._PEAK_SIZE, "cpu", 64)
    rounds = []
    play = efficiency._Meter.round
    monkeypatch.setattr(efficiency._Meter, "round", lambda meter: rounds.append(play(meter)))
    models = {
        "full": Encoder(load_retriever("random:llama")),
        "same": Encoder(load_retriever("random:llama")),
    }
    for margin, expected in ((1e9, 6), (0.0, 8)):
        rounds.clear()
        figures = measure_efficiency(models, TEXTS[:1], TEXTS[:2], rounds=8, margin=margin, reference="full")[
            "same"
        ]
        assert len(rounds) == 2 * expected
        assert 0 <= figures.other_load <= 1


def test_figures_fit_together(monkeypatch):
    monkeypatch.setitem(gemm_peak._PEAK_SIZE, "cpu", 64)
    full = Encoder(load_retriever("random:llama"))
    slim = Plan(layers=(LayerPlan(), LayerPlan(mlp=False), LayerPlan(mlp=False), LayerPlan(mlp=False)))
    small = Encoder(apply_plan(load_retriever("random:llama"), slim))
    found = measure_efficiency({"full": full, "small": small}, TEXTS[:3], TEXTS, rounds=2, reference="full")
    assert list(found) == ["full", "small"]
    for figures in found.values():
        assert figures.query_ms_p50 <= figures.query_ms_p95
        assert figures.documents_per_s == pytest.approx(1000 / figures.document_ms)
        assert figures.tokens_per_s > figures.documents_per_s
        low, high = figures.document_speedup_interval
        assert 0 < low <= figures.document_speedup <= high
        assert figures.mfu > 0 and -1 <= figures.isotropy <= 1
        assert figures.search_ms > 0
    held = {name: encoder.weight_bytes for name, encoder in {"full": full, "small": small}.items()}
    for name, encoder in {"full": full, "small": small}.items():
        own = sum(p.nbytes for p in encoder.retriever.model.parameters())
        linear = sum(m.weight.nbytes for m in encoder.retriever.model.modules() if isinstance(m, nn.Linear))
        assert held[name] == own + linear
        assert found[name].peak_memory_bytes >= held[name]
    assert held["small"] < held["full"]
    assert found["full"].query_speedup == found["full"].document_speedup == 1


def test_models_are_compared_with_the_first_on_the_texts_of_a_data_set(folder, monkeypatch):
    monkeypatch.setitem(gemm_peak._PEAK_SIZE, "cpu", 64)
    found = measure(["random:llama", "random:bert"], folder, queries=2, documents=5, rounds=1)
    assert found["random:llama"].document_speedup == 1 != found["random:bert"].document_speedup
    with pytest.raises(InputError, match="give every model once"):
        measure(["random:llama", "random:llama"], folder)


def test_unknown_reference_and_nothing_to_measure():
    models = {"full": Encoder(load_retriever("random:llama"))}
    with pytest.raises(InputError, match="measured: full"):
        measure_efficiency(models, TEXTS, TEXTS, reference="other")
    with pytest.raises(InputError, match="at least one query"):
        measure_efficiency(models, [], TEXTS, reference="full")
