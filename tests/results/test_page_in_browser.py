"""The page in a real browser: of a committed study, and of one with 5,000 trials."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from effir_ray.results import store
from effir_ray.results.report import report
from effir_ray.results.schema import TrialRow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]
ROOT = Path(__file__).parents[2]
FIGURES = ("volume", "kept", "importance", "axes", "effects", "curves", "datasets")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
TRIALS = 5000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report([ROOT / "results" / "demo"], tmp_path_factory.mktemp("real") / "report.html")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies of one data set, 5,000 trials together."""
    folder, random = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    for study in ("one", "two"):
        rows = [synthetic(study, number, random) for number in range(TRIALS // 2)]
        store.append(folder / study, rows)
        scores = {unit: random.random(16).tolist() for unit in ("attention", "mlp", "block")}
        steps = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 200)]
        write_stage(
            folder / study, "importance/x/importance.json", json.dumps({"criterion": "cosine", **scores})
        )
        write_stage(folder / study, f"recovered/{study}/history.jsonl", "\n".join(steps) + "\n")
    return report([folder / "one", folder / "two"], folder / "report.html")


def write_stage(study: Path, file: str, content: str) -> None:
    place = study / "stages" / file
    place.parent.mkdir(parents=True)
    place.write_text(content)
    (place.parent / "stage.json").write_text("{}")


def synthetic(study: str, number: int, random: np.random.Generator) -> TrialRow:
    drop, width = int(random.integers(12)), float(random.integers(5)) / 10
    plan = {str(layer): {"skip": ["mlp"]} for layer in range(drop)}
    schedule = {"drop_mlp": drop, "width_reduction": width, "importance": ["cosine", "pooled"][number % 2]}
    return TrialRow(
        study=study,
        trial_id=f"{study}{number:05d}",
        trial=json.dumps({"schedule": schedule}),
        schedule=f"{drop}M-w{int(100 * width)}" + "+ft@9" * (drop == 0),
        plan=json.dumps(plan),
        blocks=16,
        mlp_width=64,
        backbone="random:llama",
        dataset="scifact",
        split="dev",
        ndcg_at_10=float(np.clip(0.7 - 0.03 * drop - 0.2 * width + random.normal(0, 0.02), 0, 1)),
        parameters=int(1e8 - 4e6 * drop - 3e7 * width),
        document_speedup=1 + 0.06 * drop + 0.4 * width,
        recovered=drop == 0,
        model=f"stages/recovered/{study}/checkpoint" if drop == 0 else "",
    )


@pytest.fixture
def opened(browser: Browser) -> Iterator[Any]:
    """Opens a page; at the end of the test nothing has been written to its console, and nothing fetched."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 1400, "height": 1000})

    def open_page(file: Path) -> Page:
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(file.as_uri())
        page.wait_for_selector("#plot .main-svg")
        return page

    yield open_page
    context.close()
    assert wrong == []


def open_figures(page: Page) -> None:
    for name in FIGURES:
        page.click(f"#{name}-of > summary")


def serious(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420])
def test_everything_is_drawn_and_axe_finds_nothing_serious(
    real: Path, opened: Any, theme: str, width: int
) -> None:
    page = opened(real)
    page.set_viewport_size({"width": width, "height": 900})
    if page.locator("html").get_attribute("data-theme") != theme:
        page.click("#theme")
    page.locator("#front tbody button").first.click()
    open_figures(page)
    for name in FIGURES[:-1]:
        assert page.locator(f"#{name} .main-svg").count(), name
    assert page.locator("#datasets tbody tr").count() >= 5
    assert "nDCG@10" in page.locator("#detail").inner_text()
    assert serious(page) == []
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 1


def test_a_model_is_chosen_followed_to_test_queries_and_compared(real: Path, opened: Any) -> None:
    page = opened(real)
    row = page.locator("#front tbody button").first
    chosen = row.inner_text()
    row.click()
    page.select_option("#rival", index=1)
    said = page.locator("#compared").inner_text()
    assert "95 % interval" in said and "200 queries" in said and "chance over queries" in said
    page.select_option("#split", "test")
    assert page.locator("#detail h2").inner_text() == chosen
    assert "The front was chosen on dev queries" in page.locator("#summary").inner_text()


def test_the_comparison_is_the_one_of_the_command_line(real: Path, opened: Any) -> None:
    from effir_ray.results.comparison import compare

    page = opened(real)
    page.select_option("#split", "test")
    table = compare([ROOT / "results" / "demo"], split="test").to_pylist()
    baseline, best = table[0], table[1]
    page.evaluate("id => choose(rowsOf('test').find((r) => r.trial_id === id).key)", best["trial_id"])
    key = page.evaluate("id => rowsOf('test').find((r) => r.trial_id === id).key", baseline["trial_id"])
    page.select_option("#rival", key)
    numbers = [best["difference"], best["difference_low"], best["difference_high"]]
    words = page.locator("#compared").inner_text().replace(" to ", " ").replace(",", " ").replace("(", " ")
    found = [float(word) / 100 for word in words.split() if word[0] in "+-" and word[1:2].isdigit()]
    assert found == pytest.approx(numbers, abs=0.004)


def test_figures_and_tables_are_saved(real: Path, opened: Any, tmp_path: Path) -> None:
    page = opened(real)
    open_figures(page)
    for name in ("plot", *FIGURES[:-1]):
        with page.expect_download() as download:
            page.click(f"#{name} ~ .files button:has-text('CSV')")
        download.value.save_as(tmp_path / "points.csv")
        with (tmp_path / "points.csv").open(newline="") as file:
            lines = list(csv.reader(file))
        assert lines[0] == ["series", "x", "y", "value"]
        assert len(lines) > 1 or name in ("importance", "effects", "curves"), (
            name
        )  # of which rows say nothing
    for kind, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with page.expect_download() as download:
            page.click(f"#plot ~ .files button:has-text('{kind}')")
        download.value.save_as(tmp_path / "figure")
        assert (tmp_path / "figure").read_bytes().startswith(start)
    with page.expect_download() as download:
        page.click("#csv")
    download.value.save_as(tmp_path / "models.csv")
    with (tmp_path / "models.csv").open(newline="") as file:
        models = list(csv.DictReader(file))
    assert len(models) == page.evaluate("rowsOf(view.split).length")


def test_keys_alone_sort_a_table_and_keep_their_place(real: Path, opened: Any) -> None:
    page = opened(real)
    page.focus("#front-by-parameters")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "front-by-parameters"
    order = page.evaluate(
        "[...document.querySelectorAll('#front tbody tr')].map((tr) => tr.cells[0].innerText)"
    )
    sized = page.evaluate("shown().front.sort((a, b) => b.parameters - a.parameters).map(name)")
    assert order == sized and len(order) >= 2
    assert page.locator("#front th[aria-sort=descending]").inner_text().startswith("Parameters")


def test_five_thousand_trials_are_filtered_paged_and_chosen(large: Path, opened: Any) -> None:
    page = opened(large)
    assert page.locator("#summary").inner_text().startswith("5000 models")
    assert page.locator("#trials tbody tr").count() == 50  # a page of the table
    drawn = set(page.evaluate("document.getElementById('plot').data.flatMap((t) => t.customdata ?? [])"))
    assert 1000 < len(drawn) < 2000 and f"marks {len(drawn)} of them" in page.locator("#summary").inner_text()
    assert drawn >= set(page.evaluate("shown().front.map((r) => r.key)"))
    page.click("#forth")
    assert page.locator("#page").inner_text().startswith("2 of ")
    page.fill("#only", "0M-w0")  # trained, and among the best, whose curves are on the page
    assert set(page.locator("#trials tbody td:first-child").all_inner_texts()) == {"0M-w0+ft@9"}
    open_figures(page)
    assert page.evaluate("document.getElementById('curves').data.length") >= 1
    heat = page.evaluate("document.getElementById('importance').data[0]")
    assert len(heat["y"]) == 6 and sorted(heat["z"][0]) == list(range(1, 17))
    open_figures(page)  # and closed again
    page.fill("#only", "two 3M-w20")
    shown = page.evaluate("shown().points.map((r) => `${r.study} ${r.schedule}`)")
    assert set(shown) == {"two 3M-w20"}
    drawn = page.evaluate("document.getElementById('plot').data.flatMap((t) => t.customdata ?? []).length")
    assert drawn == len(shown) and "marks" not in page.locator("#summary").inner_text()
    page.fill("#only", "")
    page.select_option("#by", "study")
    page.locator("#plot .scatterlayer .points path").first.hover(force=True)
    page.wait_for_selector("#plot .hoverlayer .hovertext")
    assert "nDCG@10: 0." in page.locator("#plot .hoverlayer .hovertext").first.text_content()
    open_figures(page)
    shares = page.evaluate("DATA.effects[0].shares.ndcg_at_10")
    assert max(shares, key=shares.get) in ("schedule.drop_mlp", "schedule.width_reduction")
    assert shares["schedule.importance"] < 0.05
    page.locator("#front tbody button").first.click()
    assert page.locator("#model").count() == 1


def test_means_over_data_sets_come_first_and_each_has_its_own_scores(tmp_path: Path, opened: Any) -> None:
    """The test score beside a mean is a mean; the table of data sets has each once, and their mean."""
    scores = {"1M": (0.9, 0.1), "2M": (0.6, 0.7)}
    for name, (first, second) in scores.items():
        for split, less in (("dev", 0.0), ("test", 0.05)):
            base = {"study": "s", "trial_id": name, "trial": "{}", "schedule": name, "backbone": "b"}
            each = {"mean of x, y": (first + second) / 2, "x": first, "y": second}
            size = {"parameters": 10 if name == "1M" else 20, "split": split, "sample": "all"}
            rows = [
                TrialRow(**base, **size, dataset=data, ndcg_at_10=score - less)
                for data, score in each.items()
            ]
            store.append(tmp_path / "study", rows)
    page = opened(report([tmp_path / "study"], tmp_path / "report.html"))
    assert page.locator("#group").input_value() == "mean of x, y"
    front = page.locator("#front tbody tr").all_inner_texts()
    assert [line.split()[:3] for line in front] == [["2M", "0.6500", "0.6000"], ["1M", "0.5000", "0.4500"]]
    page.get_by_role("button", name="2M", exact=True).first.click()
    assert "compared on one data set" in page.locator("#detail").inner_text()
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    heads = page.locator("#datasets thead th").all_inner_texts()
    assert heads == ["Schedule", "Backbone", "Mean", "x", "y"]
    assert page.locator("#datasets tbody tr").first.inner_text().split() == [
        "2M",
        "b",
        "0.6500",
        "0.6000",
        "0.7000",
    ]
    page.locator("#group").select_option("x")
    assert page.locator("#front tbody tr").all_inner_texts()[0].split()[:3] == ["1M", "0.9000", "0.8500"]


def test_between_backbones_a_speed_up_has_no_front_and_rows_say_whose_they_are(
    opened: Any, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    rows = [synthetic("one", number, random) for number in range(40)]
    rows[20:] = [row.model_copy(update={"backbone": "random:bert"}) for row in rows[20:]]
    store.append(tmp_path, rows)
    page = opened(report([tmp_path], tmp_path / "report.html"))
    assert "Backbone" in page.locator("#front thead").inner_text()
    assert "No front" not in page.locator("#summary").inner_text()
    page.select_option("#x", "document_speedup")
    said = page.locator("#summary").inner_text()
    assert "0 on the front" in said and "own full one, and these are of" in said
    page.fill("#only", "random:bert")
    assert "No front" not in page.locator("#summary").inner_text()
    assert page.locator("#front tbody tr").count() >= 1


def test_paper_is_white_and_without_controls(real: Path, opened: Any) -> None:
    page = opened(real)
    if page.locator("html").get_attribute("data-theme") != "dark":
        page.click("#theme")
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#controls").is_visible() and not page.locator(".files").first.is_visible()
    assert page.pdf().startswith(b"%PDF")
