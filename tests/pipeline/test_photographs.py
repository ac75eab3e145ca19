"""The experiments with photographs, whole, from a small stand-in of their archives to a champion."""

from __future__ import annotations

import json

import pytest
import yaml
from project import Project

SMALL = {"trainer": {"max_epochs": 2, "threads": 1}}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("experiment", "data", "share", "classes", "searched"),
    [
        ("dog_breeds", "dog_breeds", 0.01, 133, {"optimizer.learning_rate", "model.arguments.units"}),
        ("dog_breeds_batch", "dog_breeds", 0.01, 133, {"optimizer.learning_rate", "trainer.batch_size"}),
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
