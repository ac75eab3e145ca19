"""A folder of one's own pictures of mixed formats, from `cnn-tuning init` to a served champion."""

import csv
import os
import signal
import subprocess
import time
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from project import Project, free_port

from cnn_tuning.data.stand_in import draw


@pytest.mark.slow
def test_from_init_to_predictions(tmp_path):
    project = Project(tmp_path / "project", "experiment: digits\nseed: 0\n")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("red ones", "green ones", "blue ones")):
        folder = project.path / "my pictures" / name
        folder.mkdir(parents=True)
        for i in range(40):
            picture = Image.fromarray(draw(4 * label, 12, (30, 24), rng))
            picture.save(folder / f"{i:02}.{('jpg', 'png', 'webp', 'gif', 'tif')[i % 5]}")
    (folder / "notes.txt").write_text("not a picture")
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


def ask(url: str, photo: bytes, server: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert server.poll() is None, server.stdout and server.stdout.read()
        try:
            return httpx.post(url, content=photo, headers={"Content-Type": "image/png"}, trust_env=False).json()
        except httpx.ConnectError:
            time.sleep(0.2)
    raise AssertionError(f"nothing answers at {url}")
