"""The report as a person opens it: in a real browser, offline, on a desk and on a phone."""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        assert not os.environ.get("CI"), "CI has to have Chromium"
        pytest.skip("no Chromium here (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)], ids=["desk", "phone"])
def test_the_report_reads_from_top_to_bottom(digits, browser, tmp_path, width, height):
    page = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{digits.path}/results/evaluation/report.html")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    sizes = page.eval_on_selector_all("img", "all => all.map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(sizes) == 8  # four of each model
    assert all(complete and natural > 100 and alt for complete, natural, alt in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    text = page.inner_text("body")
    for part in ("the baseline on the test split", "95 % interval", "Confusion matrix", "data digest"):
        assert part in text
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 20_000
    page.close()
