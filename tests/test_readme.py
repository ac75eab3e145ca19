"""The commands of the README and the docs, typed one after the other in a fresh project, on real MNIST."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import ROOT, Project

from cnn_tuning.data.stand_in import draw

# `make test` is what runs this; the environment that it sets up is linked here.
LEFT_OUT = {"make test"}
SERVERS = {"mlflow ui": 5000, "make serve": 8080, "make dashboard": 8090}


def commands(page: Path) -> list[str]:
    """Return the lines of the page's `sh` blocks without their remarks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def wait_for(port: int, process) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing answers on port {port}")


def draw_photos(folder: Path) -> None:
    """Draw a person's own pictures: two classes, three formats."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("bird", "cat")):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            picture = Image.fromarray(draw(6 * label, 12, (30, 24), rng))
            picture.save(folder / name / f"{i}.{('jpg', 'png', 'webp')[i % 3]}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readmes_commands_do_what_they_say(tmp_path):
    # A fifth of the images, one epoch, two trials: the commands are tested here, not the accuracy.
    params = "experiment: mnist\nseed: 0\ndata: {limit: 13000}\ntrainer: {max_epochs: 1}\nablation: none\n"
    params += "search: {budget: {trials: 2}, settings: {trainer.max_epochs: 1}}\n"
    project = Project(tmp_path / "project", params, docs=True)
    # Its own mark that all is installed, never a link to the environment of these tests: make writes to it.
    (project.path / ".venv").mkdir()
    (project.path / ".venv/.ready").touch()
    draw_photos(project.path / "photos")
    servers = []
    printed = {}
    try:
        pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for command in (line for page in pages for line in commands(page)):
            if command in LEFT_OUT:
                continue
            if command in SERVERS:
                servers.append(project.start("bash", "-c", command))
                wait_for(SERVERS[command], servers[-1])
                continue
            began = time.monotonic()
            printed[command] = project.run("bash", "-c", command)
            print(f"{time.monotonic() - began:4.0f} s  {command}")
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=30)
    assert "test accuracy" in printed["make repro"]
    assert "identical" in printed["cnn-tuning verify"]
    answers = [text for command, text in printed.items() if "curl" in command and "/health" not in command]
    assert len(answers) == 3
    assert all('"label":"7"' in answer.replace(" ", "") for answer in answers)


def test_every_relative_link_of_the_pages_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "bench/README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named <= targets
