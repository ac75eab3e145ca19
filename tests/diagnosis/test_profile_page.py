"""The profile of a real training as a person opens it: in a browser, offline, on a desk and on a phone."""

from __future__ import annotations

import time

import numpy as np
import pytest
from pytorch_lightning.callbacks import Callback
from training_recipes import CONF, recipe_with

from cnn_tuning.config import compose, flatten, to_plain
from cnn_tuning.diagnosis.recording import Curves, Recording
from cnn_tuning.diagnosis.rules import RULES
from cnn_tuning.diagnosis.stopwatch import Stopwatch
from cnn_tuning.diagnosis.trace import Tracer
from cnn_tuning.reports.profile import write_profile
from cnn_tuning.tracking import spool as spools
from cnn_tuning.tracking.system import read_samples, sampling, system_file
from cnn_tuning.training.fit import fit


class SlowStep(Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        time.sleep(4 if trainer.global_step == 29 else 0)


@pytest.fixture(scope="module")
def page(packed, tmp_path_factory):
    """Return the page of a real fit with one slow step, sampled and traced."""
    folder, recipe = tmp_path_factory.mktemp("profile"), recipe_with([])
    stopwatch, tracer = Stopwatch(), Tracer(folder)
    writer = spools.Writer(folder / "spool", "run")
    writer.append("start", system_metrics_every_s=0.2, **spools.writer_identity())
    with sampling(folder / "spool"):
        fit(recipe, packed, state_folder=folder, callbacks=[stopwatch, tracer, SlowStep()])
    times = stopwatch.times(read_samples(system_file(folder / "spool", "run")))
    none = np.zeros(0, np.float32)
    curves = Curves(none, none, np.array([21, 42]), none, none, none, none, 21, 42)
    recording = Recording(flatten(to_plain(recipe)), curves, times=times)
    config = compose(["experiment=digits"], params=None, conf=CONF).diagnosis
    names = [name for name, rule in RULES.items() if rule.__module__.rpartition(".")[2] in {"profile", "gpu"}]
    findings = [RULES[name](recording, **config.rules[name].thresholds) for name in names]
    write_profile(folder / "profile.html", recording, findings, operators=tracer.operators, title="<digits>")
    write_profile(folder / "bare.html", Recording(recording.recipe, curves), [])
    return folder / "profile.html"


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)], ids=["desk", "phone"])
def test_the_profile_reads_from_top_to_bottom(page, browser, tmp_path, width, height):
    view = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(f"file://{page}")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    sizes = view.eval_on_selector_all("img", "all => all.map(i => [i.complete, i.naturalWidth, i.alt])")
    assert len(sizes) == 2
    assert all(complete and natural > 100 and alt for complete, natural, alt in sizes)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    text = view.inner_text("body")
    told = ("Profile of <digits>", "step outliers", "the slowest is step 30", "waiting for data", "backward")
    shown = ("aten::convolution_backward", "no GPU took part", "Use of the machine", "median (p50)")
    for part in (*told, *shown):
        assert part in text
    parts = view.eval_on_selector_all(".bar span", "all => all.map(s => s.getBoundingClientRect().width)")
    whole = view.eval_on_selector(".bar", "bar => bar.getBoundingClientRect().width")
    assert sum(parts) == pytest.approx(whole, abs=2)
    view.screenshot(path=tmp_path / "profile.png", full_page=True)
    view.close()


def test_without_times_the_page_says_so(page):
    assert "No times were recorded" in page.with_name("bare.html").read_text()
