"""The experiments with photographs, whole, from a small stand-in of their archives to a champion."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from project import Project

from cnn_tuning.data.stand_in import draw

SMALL = {"trainer": {"max_epochs": 2, "threads": 1}}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("experiment", "data", "share", "classes", "searched"),
    [
        ("dog_breeds", "dog_breeds", 0.01, 133, {"optimizer.learning_rate", "model.arguments.units"}),
        pytest.param(
            *("dog_breeds_batch", "dog_breeds", 0.01, 133, {"optimizer.learning_rate", "trainer.batch_size"}),
            marks=pytest.mark.long,
        ),
        ("cifar10_cpu", "cifar10", 0.004, 10, set()),
    ],
)
def test_from_an_archive_to_a_champion(tmp_path, experiment, data, share, classes, searched):
    project = Project(tmp_path / "project", "experiment: smoke\nseed: 0\n")
    printed = project.run("cnn-tuning", "stand-in", data, "--share", str(share))
    told = yaml.safe_load(printed.split("params.yaml:", 1)[1])
    params = {"experiment": experiment, "seed": 0, **SMALL, **told}
    if data == "dog_breeds":
        params["data"]["image"] = {"size": [96, 96]}
    params["search"] = {"budget": {"trials": 2}, "settings": {"trainer.max_epochs": 1}, "refit_seeds": 1}
    if experiment == "dog_breeds":
        params["search"].pop("settings")  # its epochs are searched
    (project.path / "params.yaml").write_text(yaml.safe_dump(params))
    project.repro()
    if searched:
        assert set(json.loads(project.text("results/search/best.json"))["parameters"]) >= searched
    metrics = json.loads(project.text("results/evaluation/metrics.json"))
    for model in ("baseline", "tuned") if searched else ("baseline",):
        assert 0 <= metrics[model]["test"]["accuracy"] <= 1
        assert len(project.text(f"results/evaluation/{model}/classes.csv").splitlines()) == classes + 1
    shown = project.run("cnn-tuning", "show", f"models:/{params['data'].get('name', data)}-classifier@champion")
    assert experiment in shown
    if experiment == "dog_breeds":
        all_classes_of_one_picture(project)
        a_budget_run_never_becomes_champion(project, params)


def all_classes_of_one_picture(project):
    picture = Image.fromarray(draw(4, 133, (200, 160), np.random.default_rng(0)))
    picture.save(project.path / "dog.jpg")
    printed = project.run("cnn-tuning", "predict", "dog.jpg", "--label", "005.Alaskan_malamute")
    rows = re.findall(r"(?m)^ *(\d+) +(\S+) +([\d.]+)%", printed)
    assert [int(rank) for rank, _, _ in rows] == list(range(1, 134))
    assert len({label for _, label, _ in rows}) == 133
    shares = [float(share) for _, _, share in rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.1)
    answer, right = rows[0][1], rows[0][1] == "005.Alaskan_malamute"
    assert f": {answer} (" in printed.splitlines()[-1]
    assert printed.splitlines()[-1].endswith(": right" if right else ": wrong, it is 005.Alaskan_malamute")


def a_budget_run_never_becomes_champion(project, params):
    champion = project.run("cnn-tuning", "show", "models:/dog_breeds-classifier@champion")
    budget = {"experiment": "dog_breeds_budget", "seed": 0, "data": params["data"], "trainer": {"threads": 1}}
    (project.path / "params.yaml").write_text(yaml.safe_dump(budget))
    project.repro()
    [told] = json.loads(project.text("results/evaluation/registration.json")).values()
    assert not told["promoted"]
    assert "a budget run of one epoch" in told["reason"]
    assert project.run("cnn-tuning", "show", "models:/dog_breeds-classifier@champion") == champion
