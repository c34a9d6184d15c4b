"""The analysis: its numbers against accounting and planning, its files as a reader finds them."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pyarrow import feather

import effir_ray
from effir_ray.compression.analysis.analyze import analyze
from effir_ray.compression.analysis.page import write_page
from effir_ray.compression.analysis.summary import Analysis, summarize
from effir_ray.compression.calibration import draw_pairs
from effir_ray.compression.depth.importance import measure_importance
from effir_ray.compression.pipeline import compress
from effir_ray.compression.planning import ImportanceScores, make_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.data.datasets import load_dataset
from effir_ray.errors import InputError
from effir_ray.models.accounting import count_parameters, flops
from effir_ray.models.loading import load_config
from effir_ray.models.retriever import load_retriever
from tests.helpers.beir_folders import HEADER, write_lines
from tests.helpers.compression_examples import QUERIES, TEXTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the example texts, half of them asked for by dev queries."""
    folder = tmp_path_factory.mktemp("data") / "examples"
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", *({"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)))
    write_lines(folder / "queries.jsonl", *({"_id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)))
    (folder / "qrels/dev.tsv").write_text(HEADER + "q0\td0\t1\nq1\td3\t1\n")
    return folder


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Analysis, Path]:
    out = tmp_path_factory.mktemp("analysis") / "new"
    return analyze(
        "random:gemma2", out, criteria=("cosine", "pooled", "dev-loss"), dataset=str(folder), texts=len(TEXTS)
    ), out


def test_scores_and_orders_are_those_of_the_library(analysed: tuple[Analysis, Path], folder: Path) -> None:
    analysis, _ = analysed
    data, pairs = load_dataset(folder), draw_pairs(str(folder), 4, 0, split="dev")
    queries = list(data.queries("dev").values())
    assert sorted(queries) == sorted(QUERIES)
    retriever = load_retriever("random:gemma2")
    assert analysis.criteria == ("cosine", "pooled", "dev-loss")
    for criterion in analysis.criteria:
        scores = measure_importance(retriever, TEXTS, criterion=criterion, queries=queries, pairs=pairs)
        for unit in ("attention", "mlp", "block"):
            group = analysis.group(criterion, unit)
            values = [row.importance for row in group]
            assert values == pytest.approx(getattr(scores, unit), abs=1e-5)
            first_to_go = [row.layer for row in sorted(group, key=lambda row: row.order)]
            assert first_to_go == sorted(range(4), key=lambda layer: values[layer])


def test_sizes_are_those_of_the_plans(analysed: tuple[Analysis, Path]) -> None:
    analysis, _ = analysed
    config = load_config("random:gemma2")
    retriever = load_retriever("random:gemma2")
    scores = measure_importance(retriever, TEXTS)
    for row in analysis.sizes:
        if row.criterion == "cosine":
            plan = make_plan(Schedule(**{f"drop_{row.unit}": row.k}), 4, scores)
            assert row.parameters == count_parameters(config, plan)
            assert row.document_flops == flops(config, plan, 512)
    assert analysis.parameters == sum(p.numel() for p in retriever.model.parameters())
    shares = {
        unit: sum(row.parameter_share for row in analysis.group("cosine", unit))
        for unit in ("attention", "mlp")
    }
    assert sum(shares.values()) == pytest.approx(1 - (512 * 64 + 64) / analysis.parameters)
    block = [row.document_flop_share for row in analysis.group("cosine", "block")]
    assert sum(block) == pytest.approx(1)


def test_files_can_be_read_without_effir_ray(analysed: tuple[Analysis, Path]) -> None:
    analysis, out = analysed
    table = feather.read_table(out / "sublayers.arrow")
    assert table.num_rows == 3 * 3 * 4
    assert table.to_pylist() == [row.model_dump() for row in analysis.sublayers]
    assert feather.read_table(out / "sizes.arrow").num_rows == 3 * 3 * 5
    assert json.loads((out / "analysis.json").read_text())["parameters"] == analysis.parameters
    page = (out / "analysis.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)[^"]*/', page)  # nothing is fetched from elsewhere
    linked = re.findall(r'href="([^"]+\.svg)"', page)
    assert sorted(linked) == sorted(file.name for file in out.glob("*.svg"))
    assert len(linked) == 2 + 3 * 2 + 1
    similarities = feather.read_table(out / "similarities.arrow")
    assert similarities.to_pylist() == [row.model_dump() for row in analysis.similarities]
    assert not list(out.glob(".*"))


def test_heat_map_shows_every_place_in_the_order(analysed: tuple[Analysis, Path]) -> None:
    analysis, out = analysed
    drawn = ElementTree.parse(out / "order_cosine.svg").getroot()
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    cells = [
        str(row.order) for unit in ("attention", "mlp", "block") for row in analysis.group("cosine", unit)
    ]
    assert cells == [text for text in texts if text in {"1", "2", "3", "4"}][-12:]
    assert {"Attention", "MLP", "Block"} <= set(texts)


def test_seven_billion_parameters_are_analysed_from_a_configuration() -> None:
    config, layers = load_config("mistralai/Mistral-7B-v0.1"), 32
    scores = ImportanceScores(
        criterion="cosine", **{unit: range(layers, 0, -1) for unit in ("attention", "mlp", "block")}
    )
    analysis = summarize(
        "mistral-7b",
        config,
        {"cosine": scores},
        query_tokens=32,
        document_tokens=512,
        calibration_texts=256,
    )
    sizes = {(row.unit, row.k): row.parameters for row in analysis.sizes}
    billions = [round(sizes[key] / 1e9, 2) for key in (("mlp", 0), ("mlp", 8), ("mlp", 16))]
    assert billions == [7.11, 5.70, 4.29]
    assert [row.order for row in analysis.group("cosine", "mlp")] == list(range(32, 0, -1))
    assert sizes["block", 32] == 32_000 * 4096 + 4096  # embeddings and the final norm


def test_of_a_compressed_model_only_what_is_left_counts(tmp_path: Path) -> None:
    compress("random:llama", Schedule(drop_mlp=(1,), width_reduction=0.5, width_method="magnitude"), tmp_path)
    config, model = load_config(tmp_path), load_retriever(tmp_path).model
    level = (0.0, 0.0, 0.0, 0.0)
    scores = ImportanceScores(criterion="cosine", attention=level, mlp=level, block=level)
    analysis = summarize(
        "small", config, {"cosine": scores}, query_tokens=8, document_tokens=64, calibration_texts=1
    )
    assert analysis.parameters == sum(p.numel() for p in model.parameters())
    shares = [row.parameter_share for row in analysis.group("cosine", "mlp")]
    assert shares[1] == 0 < shares[0]
    (last,) = (row for row in analysis.sizes if (row.unit, row.k) == ("block", 4))
    assert last.parameters < analysis.parameters


def test_without_dev_queries_there_is_no_similarity(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "test-only")
    (tmp_path / "test-only/qrels/dev.tsv").rename(tmp_path / "test-only/qrels/test.tsv")
    analysis = analyze("random:llama", tmp_path / "out", dataset=str(tmp_path / "test-only"), texts=4)
    assert not analysis.similarities
    assert not list((tmp_path / "out").glob("similarit*"))


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no importance criterion"):
        analyze("random:llama", tmp_path, criteria=())
    with pytest.raises(InputError, match="unknown importance criterion 'cosin'"):
        analyze("random:llama", tmp_path, criteria=("cosin",))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="cannot be used as the output folder"):
        analyze("random:llama", file)


def test_a_name_cannot_become_markup(analysed: tuple[Analysis, Path], tmp_path: Path) -> None:
    analysis, _ = analysed
    write_page(analysis.model_copy(update={"backbone": "<script>alert(1)</script>"}), tmp_path)
    page = (tmp_path / "analysis.html").read_text()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 2  # the title and the heading


def test_the_public_function_is_the_commands() -> None:
    assert effir_ray.analyze is analyze
