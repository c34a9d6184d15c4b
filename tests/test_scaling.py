"""docs/scaling.md and cluster/README.md say what benchmarks/scaling.py computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import scaling

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
GUIDE = (ROOT / "cluster" / "README.md").read_text()


def test_the_page_holds_the_tables_that_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main()
    _, encoding, study = capsys.readouterr().out.rstrip().split("\n\n")
    assert encoding in PAGE
    assert study in PAGE


def test_the_page_names_the_rates_and_the_assumptions_of_the_script() -> None:
    rates = scaling.measured()
    for said in (
        rates.hardware,
        f"| {rates.tokens_a_word:.2f} |",
        f"| {rates.of_peak:.0%}".replace("%", " %"),
        f"| {rates.of_bound:.0%}".replace("%", " %"),
        f"**{scaling.UTILISATION:.0%}**".replace("%", " %"),
        f"{scaling.TRAIN_QUERIES:,} questions",
        f"{sum(scaling.BEIR_SETS[name].documents for name in scaling.in_paper()):,} documents",
    ):
        assert said in PAGE


def test_a_compressed_model_and_more_gpus_take_less_time() -> None:
    names = scaling.in_paper()
    full, small = (scaling.corpus_flops(schedule, names) for schedule in ("full", "16M-w30+ft"))
    assert 1.9 < full / small < 2.1
    first = next(row for row in scaling.encoding_rows() if row[:2] == ["full", "H100 80 GB"])
    assert float(first[2]) / float(first[3]) == pytest.approx(8, rel=0.03)


def test_the_cluster_guide_says_what_the_dry_run_says() -> None:
    _, preview = scaling.study()
    hours = [scaling.gpu_hours(sum(scaling.study_flops().values()), gpu) for gpu in scaling.PEAKS]
    assert f"about {round(hours[0], -1):.0f} GPU hours on A100, {hours[1]:.0f} on H100" in GUIDE
    assert f"{preview.peak_bytes / 1e9:.0f} GB at the peak" in GUIDE
    assert f"{preview.end_bytes / 1e9:.0f} GB in the end" in GUIDE
    assert f"{len(preview.trials)} schedules, {preview.stages['recovered']} of them fine-tuned" in GUIDE
    (loaded,) = re.findall(r"load (\d+) GB of float32", GUIDE)
    assert float(loaded) == round(preview.trials[0].parameters * 4 / 1e9)
