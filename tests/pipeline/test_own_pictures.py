"""A folder of one's own pictures of mixed formats, from `cnn-tuning init` to a served champion."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from project import Project, free_port

from cnn_tuning.data.stand_in import draw


@pytest.mark.slow
def test_from_init_to_predictions(tmp_path):
    project = Project(tmp_path / "project", "experiment: digits\nseed: 0\n")
    take_pictures(project.path / "my pictures", 40, (30, 24))
    (project.path / "my pictures/blue ones/notes.txt").write_text("not a picture")
    printed = project.run("cnn-tuning", "init", "my pictures", "--size", "24")
    assert "120 readable pictures" in printed and "1 unreadable" in printed
    small = (
        "search: {budget: {trials: 1}, settings: {trainer.max_epochs: 1}}\ntrainer: {max_epochs: 4, threads: 1}\n"
    )
    (project.path / "params.yaml").write_text(f"experiment: my_pictures\nseed: 0\n{small}")
    project.repro()
    assert "blue ones" in project.text("results/data/sheet.md")
    project.run("cnn-tuning", "predict", "my pictures", "--out", "predictions.csv")
    with (project.path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = [row for row in rows if row.get("label") and row["label"] in row["path"]]
    assert len(rows) == 121 and len(right) > 70
    port = free_port()
    server = project.start("cnn-tuning", "serve", f"serving.port={port}")
    try:
        photo = (project.path / "my pictures/blue ones/01.png").read_bytes()
        answer = ask(f"http://127.0.0.1:{port}/predict", photo, server)
        assert answer["predictions"][0]["label"] in ("red ones", "green ones", "blue ones")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


@pytest.mark.slow
def test_a_pretrained_network_learns_them(tmp_path):
    """`experiment=image_folder` as it is shipped, with few small pictures and a short search."""
    project = Project(tmp_path / "project", "experiment: smoke\nseed: 0\n")
    take_pictures(project.path / "photos", 20, (80, 64))
    small = {
        "data": {"image": {"size": [64, 64]}},
        "trainer": {"threads": 1},
        "search": {"budget": {"trials": 2}, "seeds": 1, "refit_seeds": 1},
    }
    (project.path / "params.yaml").write_text(yaml.safe_dump({"experiment": "image_folder", "seed": 0, **small}))
    project.repro()
    metrics = json.loads(project.text("results/evaluation/metrics.json"))
    assert metrics["baseline"]["test"]["accuracy"] > 0.5  # of three classes, unlike in colour
    assert json.loads(project.text("models/baseline/model.json"))["model"]["pretrained"]
    printed = project.run("cnn-tuning", "predict", "photos/blue ones/01.png")
    assert printed.splitlines()[-1].startswith("photos/blue ones/01.png: ")


def take_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Draw as many pictures of each of three classes, in mixed formats."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("red ones", "green ones", "blue ones")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.fromarray(draw(4 * label, 12, size, rng))
            picture.save(folder / name / f"{i:02}.{('jpg', 'png', 'webp', 'gif', 'tif')[i % 5]}")


def ask(url: str, photo: bytes, server: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert server.poll() is None, server.stdout and server.stdout.read()
        try:
            return httpx.post(url, content=photo, headers={"Content-Type": "image/png"}, trust_env=False).json()
        except httpx.ConnectError:
            time.sleep(0.2)
    raise AssertionError(f"nothing answers at {url}")
