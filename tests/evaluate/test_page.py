"""report.html in a browser: no error, tables sort, clips play, wide and narrow, light and dark."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_report import make_example_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    report = make_example_report()
    time = np.arange(16_000) / 16_000
    tone = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    losses = [{"step": n, "loss": 3 / n, "kl": 1 / n, "ce": 2 / n} for n in range(1, 20)]
    report = dataclasses.replace(
        report,
        worst=[one._replace(waveform=tone) for one in report.worst],
        losses=[*losses, {"step": 20, "validation/wer": 9.0}],
        recipe="[evaluate]\nmodels = []\n",
    )
    folder = tmp_path_factory.mktemp("report")
    report.save(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell")
    os.environ.pop("DEBUG", None)
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, page_path):
    """Opens the page; after the test there must have been neither an error nor a request."""
    contexts, faults = [], []

    def open_page(width: int = 1200, scheme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url[:80]))
        page.goto(page_path.as_uri())
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{width}-{scheme}.png", full_page=True)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def test_tables_sort(opened):
    page = opened()
    table = page.locator("#datasets table")
    column = lambda: table.locator("tbody tr td:nth-child(4)").all_text_contents()
    before = column()
    head = table.get_by_role("button", name="WER %")
    head.click()
    assert [float(text.split()[0]) for text in column()] == [0, 75]
    assert table.locator("th").nth(3).get_attribute("aria-sort") == "ascending"
    head.click()
    assert [float(text.split()[0]) for text in column()] == [75, 0]
    assert sorted(before) == sorted(column())
    table.get_by_role("button", name="model").press("Enter")
    assert table.locator("tbody tr td:nth-child(2)").first.text_content() == "student | 2"


def test_a_clip_plays(opened):
    page = opened()
    assert page.locator("audio").count() == 2
    page.evaluate("document.querySelector('audio').play()")
    page.wait_for_function("document.querySelector('audio').currentTime > 0.2")
    length = page.evaluate("document.querySelector('audio').duration")
    assert length == pytest.approx(1.0, abs=0.2)


def test_words_are_aligned_and_every_line_names_its_models(opened):
    """Columns stand at one place in all rows, and marks are read without colour."""
    page = opened(360)
    block = page.locator(".aligned").first
    assert block.locator("ins").all_text_contents() == ["at", "the"]
    column = block.locator("div", has=page.locator("ins", has_text="at"))
    places = [one.bounding_box()["x"] for one in column.locator("> *").all()]
    assert max(places) - min(places) < 1
    plus = "getComputedStyle(document.querySelector('.aligned ins'), '::before').content"
    assert page.evaluate(plus) == '"+"'
    for selector, line in (("mark", "underline"), ("del", "line-through")):
        style = f"getComputedStyle(document.querySelector('.note {selector}')).textDecorationLine"
        assert page.evaluate(style) == line
    page.evaluate("""() => {
        const block = document.querySelector('.aligned'), word = block.lastElementChild;
        for (let n = 0; n < 60; n++) block.append(word.cloneNode(true));
        nameLines() }""")
    lines = page.evaluate("""() => {
        const words = [...document.querySelector('.aligned').children];
        const tops = new Set(words.filter((one) => one.tagName === 'DIV').map((o) => o.offsetTop));
        return [tops.size, words.filter((one) => one.classList.contains('names')).length] }""")
    assert lines[0] == lines[1] > 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_it_fits_and_can_be_read(opened, width, scheme):
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".model .rate").all_text_contents() == ["0.0 % WER", "75.0 % WER"]
    colours = page.evaluate(
        """() => [document.body, document.querySelector("figure svg text")].map(
            (one) => getComputedStyle(one).color)
            .concat(getComputedStyle(document.body).backgroundColor)"""
    )
    text, label, back = (
        np.mean([float(part) for part in colour.strip("rgba()").split(",")[:3]])
        for colour in colours
    )
    assert abs(text - back) > 150
    assert (back > 128) == (scheme == "light")
    fill = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert abs(np.mean([float(part) for part in fill.strip("rgba()").split(",")[:3]]) - back) > 150
    assert label == text
    assert page.locator("figure svg").count() == 4
