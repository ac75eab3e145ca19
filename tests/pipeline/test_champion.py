"""The registered champion answers: over HTTP by both servers, and for a folder of pictures."""

from __future__ import annotations

import base64
import csv
import io
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image
from project import free_port

from cnn_tuning.data.packed import PackedData

URI = "models:/digits-classifier@champion"


@pytest.fixture(scope="module")
def pictures(digits):
    """The first test images as PNG, with what `evaluate` answered for them."""
    test = PackedData.open(digits.path / "data/prepared").split("test")
    lines = digits.text(f"results/evaluation/{digits.champion}/predictions.csv").splitlines()[1:]
    rows = list(csv.DictReader(lines))[:20]
    encoded = []
    for image in test.images[:20]:
        buffer = io.BytesIO()
        Image.fromarray(image[0]).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded, [(int(row["predicted"]), float(row["probability"])) for row in rows]


@contextmanager
def serving(project, command: str, port: int, health: str):
    process = project.start("bash", "-c", f"exec {command}")
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"http://127.0.0.1:{port}{health}", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def test_the_front_answers_as_evaluate_did(digits, pictures):
    port = free_port()
    with serving(digits, f"cnn-tuning serve serving.port={port}", port, "/health") as client:
        assert client.get("/health").json()["name"] == "digits-classifier"
        for picture, (index, probability) in zip(*pictures, strict=True):
            answer = client.post("/predict?top_k=3", content=picture, headers={"Content-Type": "image/png"})
            (found,) = answer.json()["predictions"]
            assert found["index"] == index
            assert found["probability"] == pytest.approx(probability, abs=2e-6)
            assert len(found["top_k"]) == 3


def test_mlflow_models_serve_answers_as_evaluate_did(digits, pictures):
    port = free_port()
    command = f"mlflow models serve -m {URI} -p {port} --env-manager local"
    with serving(digits, command, port, "/ping") as client:
        images = [base64.b64encode(picture).decode() for picture in pictures[0]]
        body = {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}}
        answer = client.post("/invocations", json=body)
        assert answer.status_code == 200, answer.text
        for found, (index, probability) in zip(answer.json()["predictions"], pictures[1], strict=True):
            assert found["index"] == index
            assert found["probability"] == pytest.approx(probability, abs=2e-6)


def test_predict_writes_a_row_a_picture_and_names_what_it_could_not_read(digits, pictures, tmp_path):
    for number, picture in enumerate(pictures[0]):
        (tmp_path / f"{number:02}.png").write_bytes(picture)
    (tmp_path / "broken.png").write_bytes(pictures[0][0][:40])
    out = tmp_path / "out.csv"
    printed = digits.run("cnn-tuning", "predict", str(tmp_path), "--out", str(out), "--top-k", "2")
    assert "20 pictures classified by digits-classifier version 1, 1 unreadable" in " ".join(printed.split())
    rows = {Path(row["path"]).name: row for row in csv.DictReader(out.open())}
    assert rows["broken.png"]["error"]
    for number, (index, _) in enumerate(pictures[1]):
        assert int(rows[f"{number:02}.png"]["index"]) == index


@pytest.mark.slow
def test_commands_that_find_no_model_say_so_in_a_line(digits):
    for command in (("predict", "."), ("serve", f"serving.port={free_port()}")):
        told = digits.run("cnn-tuning", *command, "--model", "models:/nothing@champion", fails=True)
        assert "Traceback" not in told
        assert "nothing" in told
    assert digits.champion
