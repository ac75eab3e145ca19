"""The report as a person opens it: in a real browser, offline, on a desk and on a phone."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from cnn_tuning.config import EvaluationConfig, ImageConfig
from cnn_tuning.data.packed import Meta
from cnn_tuning.diagnosis.findings import fired, not_evaluated, ok, write_findings
from cnn_tuning.evaluation import outcome
from cnn_tuning.evaluation.chapters import Folders
from cnn_tuning.evaluation.metrics import measure
from cnn_tuning.evaluation.mistakes import Mistake
from cnn_tuning.evaluation.report import Origin, Section, write_report
from cnn_tuning.reports import plots

CODE = "<script>window.hacked = 1</script>"
CLASSES = (CODE, '"><img src=x onerror="window.hacked = 2">', "a" * 120)
REMEDY = {"optimizer.learning_rate": 1e-05, "model.dropout": "dense", "model.dense_dropout": 0.3}


@pytest.fixture
def read(browser):
    """Return a function that opens a page at a width; it is whole, quiet, offline and no wider than that."""
    opened = []

    def read(path, width, **more):
        page = browser.new_page(viewport={"width": width, "height": 900}, **more)
        opened.append(page)
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{path}")
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        images = page.eval_on_selector_all("img", "all => all.map(i => [i.complete && i.naturalWidth, i.alt])")
        assert images
        assert all(natural > 0 and alt for natural, alt in images)
        addresses = page.eval_on_selector_all("img", "all => all.map(i => i.src)")
        assert all(address.startswith("data:image/") for address in addresses)
        # Also with all that is folded away.
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        links = page.eval_on_selector_all("nav a", "all => all.map(a => a.getAttribute('href'))")
        assert all(page.locator(f"[id='{link[1:]}']").count() == 1 for link in links)
        return page

    yield read
    for page in opened:
        page.close()


@pytest.mark.parametrize(("width", "colours"), [(1100, "light"), (390, "dark")], ids=["desk", "phone"])
def test_the_report_reads_from_top_to_bottom(digits, read, tmp_path, width, colours):
    page = read(f"{digits.path}/results/evaluation/report.html", width, color_scheme=colours)
    headings = page.eval_on_selector_all("h2", "all => all.map(h => h.innerText)")
    wanted = ["Result", "Ablations", "Search", "Diagnosis", "The tuned model", "The baseline model", "Data",
              "Time and cost", "Where this comes from"]  # fmt: skip
    assert [w for w, heading in zip(wanted, headings, strict=True) if not heading.startswith(w)] == []
    pictures = page.eval_on_selector_all(
        "figure:has(figcaption)",
        "all => all.map(f => [f.querySelector('figcaption').textContent, f.querySelector('img').alt])",
    )
    for caption in ("Calibration", "History: every trial, and the best so far"):
        assert [caption, caption] in pictures
    text = page.inner_text("body")
    verdicts = digits.text("results/ablation/dropout/verdicts.txt").splitlines()
    commit = digits.run("git", "log", "--format=%H").split()
    weights = yaml.safe_load(digits.text("models/tuned/model.json"))["weights_sha256"]
    for part in ("359 test images", "95 % interval", "the baseline on the test split", "Confusion matrix",
                 "data digest", "version 1", "version 2", "first champion", weights, *verdicts):  # fmt: skip
        assert part in text
    assert any(one in text for one in commit)
    wrong = [row.split(",") for row in digits.text("results/evaluation/tuned/answers.csv").splitlines()[1:]]
    mistakes = page.locator(".mistakes").first.locator("li")
    assert mistakes.count() == sum(true != answer for true, answer in wrong)
    assert mistakes.locator("img").count() == 2 * mistakes.count()  # each beside what the network looked at
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert (digits.path / "results/evaluation/report.html").stat().st_size < 3e6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page about one model with code for names, with findings, and without any other chapter."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(3, 0.3), 60).astype(np.float32)
    labels = rng.integers(0, 3, 60)
    config = EvaluationConfig("test", bootstrap_samples=100)
    metrics = measure(probabilities, labels, CLASSES, config, seed=0)
    outcome.write_tables(folder, metrics, CLASSES)
    plots.confusion_matrix(metrics.confusion, CLASSES, folder / "confusion.png")
    plots.calibration(folder / "calibration.csv", 0.95, folder / "calibration.png")
    history = "epoch,train/loss,train/accuracy,val/loss,val/accuracy\n1,1,.5,1,.5\n2,.5,.7,.9,.6\n"
    (folder / "history.csv").write_text(history)
    plots.learning_curves(folder / "history.csv", folder / "learning_curves.png")
    large = rng.integers(0, 256, (300, 200, 3), dtype=np.uint8)
    mistakes = [Mistake(7, large, large, CLASSES[0], CLASSES[1], 0.9), Mistake(8, large, None, *CLASSES[1:], 0.8)]
    section = Section(
        name="baseline",
        metrics=metrics,
        folder=folder,
        weights="0" * 64,
        best={"epoch": 2, "step": 40},
        training={"run": "run-1", "seconds": {"fit": 4000.0}, "samples_per_second": 9, "device": "cpu",
                  "precision": "32-true", "threads": 1},
        recipe={"optimizer": {"learning_rate": 0.1}},
        mistakes=mistakes,
        gate=f"not registered {CODE}",
        run="run-2",
    )  # fmt: skip
    (folder / "results/diagnosis").mkdir(parents=True)
    write_findings(
        folder / "results/diagnosis/findings.json",
        [
            fired("too_high", f"It rose {CODE}.", advice="Lower it.", remedy=REMEDY, first_step=1200,
                  evidence={"steps": list(range(30)), "loss": 0.123456, "of": CODE}),
            fired("no_remedy", "There is nothing to change.", evidence={}, advice=""),
            ok("quiet", "Nothing was found."),
            not_evaluated("short", f"Too few steps {CODE}."),
        ],
    )  # fmt: skip
    image = ImageConfig((32, 48), 3)
    meta = Meta(CODE, CLASSES, image, {"train": (9, 9, 9), "val": (1, 1, 1), "test": (20, 20, 20)}, (0.5,) * 3,
                (0.2,) * 3, 1, 0, {CODE: "f" * 64}, {})  # fmt: skip
    names = ("data", "training", "ablation", "search", "diagnosis")
    folders = Folders(*(folder / "results" / name for name in names))
    origin = Origin(meta, folder, folders, {"commit": CODE})
    write_report(folder / "report.html", origin, [section], None, bins=15, price_per_hour=0.9)
    return folder / "report.html"


@pytest.mark.parametrize("width", [1100, 390], ids=["desk", "phone"])
def test_names_are_text_whatever_they_hold(made, read, width):
    page = read(made, width)
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 0
    text = page.inner_text("body")
    assert all(name in text for name in CLASSES)


def test_what_an_experiment_has_not_is_left_out_with_a_line(made, read):
    page = read(made, 390)
    text = page.inner_text("body")
    for line in ("No ablation in this experiment.", "No search in this experiment."):
        assert line in text
    assert page.eval_on_selector_all("nav a", "all => all.map(a => a.hash)") == [
        "#result", "#diagnosis", "#baseline", "#data", "#cost", "#lineage"
    ]  # fmt: skip
    assert "1 h 6 min" in text
    assert "$1.00" in text  # 4,000 s at $0.90 an hour


def test_findings_that_fired_stand_out_with_evidence_and_a_patch(made, read):
    page = read(made, 390)
    cards = page.locator(".card")
    assert cards.count() == 2
    said = cards.first.inner_text()
    for part in ("too high", "since step 1,200", "Lower it.", "0.1235", "(30 in all)"):
        assert part in said
    patch = yaml.safe_load(cards.first.locator("pre").inner_text())
    assert patch == {"optimizer": {"learning_rate": 1e-05}, "model": {"dropout": "dense", "dense_dropout": 0.3}}
    assert cards.nth(1).locator("pre").count() == 0
    others = page.locator("details table").first.inner_text()
    for part in ("quiet", "Nothing was found.", "not evaluated", "Too few steps"):
        assert part in others
