"""The same images give the same bits at every hop: memory, bundle, MLflow model, both HTTP servers."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live as servers
import numpy as np
import pandas as pd
import pytest
import torch

Rows = list[tuple[int, float]]


@pytest.fixture(scope="module")
def stock(mlflow_model: Path) -> Iterator[servers.Live]:
    """`mlflow models serve` around the same model."""
    port = servers.free_port()
    mlflow = str(Path(sys.executable).with_name("mlflow"))
    command = [mlflow, "models", "serve", "-m", str(mlflow_model), "--env-manager", "local", "--port", str(port)]
    with servers.running([*command, "--workers", "1"], port) as server:
        yield server


@pytest.fixture(scope="module")
def texts(digits: np.ndarray) -> list[str]:
    return [base64.b64encode(servers.png(image[0])).decode() for image in digits]


@pytest.fixture(scope="module")
def expected(trained: tuple[Any, Path], digits: np.ndarray) -> Rows:
    """What the network in memory says: the best class and its probability."""
    with torch.inference_mode():
        rows = torch.softmax(trained[0](torch.from_numpy(digits)), 1).numpy()
    assert len(set(rows.argmax(1))) > 1
    return [(int(row.argmax()), float(row.max())) for row in rows]


def _rows(predictions: list[dict[str, Any]]) -> Rows:
    return [(row["index"], row["probability"]) for row in predictions]


def test_bundle(bundle: Path, digits: np.ndarray, expected: Rows) -> None:
    from cnn_tuning.serving.predictor import Predictor

    answers = Predictor(bundle).predict([image[0] for image in digits])
    assert [(answer.index, answer.probability) for answer in answers] == expected


def test_mlflow_model(mlflow_model: Path, texts: list[str], expected: Rows) -> None:
    import mlflow

    answer = mlflow.pyfunc.load_model(str(mlflow_model)).predict(pd.DataFrame({"image": texts}))
    assert _rows(answer.to_dict("records")) == expected


@pytest.mark.parametrize("server", ["live", "stock"])
@pytest.mark.parametrize(
    "form", ["inputs", "inputs column", "inputs arrays", "instances", "records", "records arrays", "split"]
)
def test_both_servers_take_every_form(
    server: str, form: str, request: pytest.FixtureRequest, texts: list[str], digits: np.ndarray, expected: Rows
) -> None:
    arrays = [image[0].tolist() for image in digits]
    forms: dict[str, dict[str, Any]] = {
        "inputs": {"inputs": texts},
        "inputs column": {"inputs": {"image": texts}},
        "inputs arrays": {"inputs": arrays},
        "instances": {"instances": texts},
        "records": {"dataframe_records": [{"image": text} for text in texts]},
        "records arrays": {"dataframe_records": [{"image": array} for array in arrays]},
        "split": {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
    }
    reply = request.getfixturevalue(server).post({**forms[form], "params": {"top_k": 3}})
    assert reply.status == 200, reply.text
    assert _rows(reply.json["predictions"]) == expected
    assert all(
        len(row["top_k"]) == 3 and row["top_k"][0]["label"] == row["label"] for row in reply.json["predictions"]
    )


def test_both_servers_answer_alike(live: servers.Live, stock: servers.Live, texts: list[str]) -> None:
    payload = {"inputs": texts, "params": {"top_k": 10}}
    assert live.post(payload).json == stock.post(payload).json


def test_single_picture_as_the_model_alone(live: servers.Live, bundle: Path, digits: np.ndarray) -> None:
    from cnn_tuning.serving.predictor import Predictor

    for image in digits:
        (alone,) = Predictor(bundle).predict([image[0]])
        (answer,) = live.ask("/predict", servers.png(image[0]), "image/png").json["predictions"]
        assert (answer["label"], answer["index"]) == (alone.label, alone.index)
        assert answer["probability"] == alone.probability


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_photo_of_any_kind_is_the_same_at_every_hop(
    kind: str, live: servers.Live, mlflow_model: Path, bundle: Path
) -> None:
    import mlflow

    from cnn_tuning.serving.predictor import Predictor

    photo = servers.png(np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8), kind)
    (expected,) = Predictor(bundle).predict([photo])
    (served,) = live.ask("/predict", photo, f"image/{kind.lower()}").json["predictions"]
    loaded = mlflow.pyfunc.load_model(str(mlflow_model))
    (loaded_answer,) = loaded.predict(pd.DataFrame({"image": [photo]})).to_dict("records")
    assert served["probability"] == loaded_answer["probability"] == expected.probability
    assert served["label"] == loaded_answer["label"] == expected.label


BAD = {
    "no image": {"inputs": [base64.b64encode(b"hello").decode()]},
    "wrong column": {"dataframe_records": [{"picture": "abc"}]},
    "no rows": {"dataframe_split": {"columns": ["image"], "data": []}},
    "negative top_k": {"inputs": [[[1]]], "params": {"top_k": -1}},
    "NaN": {"inputs": [[[float("nan")]]]},
}


@pytest.mark.parametrize("name", BAD)
def test_the_stock_server_answers_bad_input_without_a_traceback(stock: servers.Live, name: str) -> None:
    reply = stock.ask("/invocations", json.dumps(BAD[name]).encode(), "application/json")
    assert 400 <= reply.status < 500, (reply.status, reply.text)
    assert "Traceback" not in reply.text and ".py" not in reply.text, reply.text
