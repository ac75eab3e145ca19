"""The MLflow model: same answers as the predictor, loads without the repository, refuses bad input cleanly."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from live import assert_one_line, make_bundle, png

from cnn_tuning.serving import pyfunc
from cnn_tuning.serving.predictor import Predictor


@pytest.fixture(scope="module")
def model(mlflow_model: Path) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(str(mlflow_model))


def _text(image: np.ndarray) -> str:
    return base64.b64encode(png(image)).decode()


def _plain(predictions: pd.DataFrame) -> list[tuple]:
    return [
        (row["label"], row["index"], row["probability"], [tuple(choice.values()) for choice in row["top_k"]])
        for row in predictions.to_dict("records")
    ]


def _expected(bundle: Path, images: list, top_k: int) -> list[tuple]:
    return [
        (p.label, p.index, p.probability, [(c.label, c.index, c.probability) for c in p.top_k])
        for p in Predictor(bundle).predict(images, top_k)
    ]


def test_every_form_of_image_gives_the_predictors_answer(model: Any, bundle: Path, digits: np.ndarray) -> None:
    images = [image[0] for image in digits]
    expected = _expected(bundle, images, 3)
    for cells in (
        [_text(image) for image in images],
        [f"data:image/png;base64,{_text(image)}" for image in images],
        [png(image) for image in images],
        [image.tolist() for image in images],
        images,
    ):
        answer = model.predict(pd.DataFrame({"image": cells}), params={"top_k": 3})
        assert list(answer.columns) == ["label", "index", "probability", "top_k"]
        assert _plain(answer) == expected


def test_a_list_of_texts_as_the_scoring_server_passes_it(model: Any, bundle: Path, digits: np.ndarray) -> None:
    images = [image[0] for image in digits]
    answer = model.predict({"image": [_text(image) for image in images]})
    assert _plain(answer) == _expected(bundle, images, 1)


BAD = {
    "no rows": ([], {}, "no images"),
    "text": (["hello!"], {}, "row 0"),
    "second row": ([None, 1], {}, "row 0"),
    "no image": ([base64.b64encode(b"hello").decode()], {}, "row 0"),
    "empty bytes": ([b""], {}, "row 0"),
    "NaN": ([[[float("nan")]]], {}, "row 0"),
    "NaN cell": ([float("nan")], {}, "row 0"),
    "too bright": ([[[256]]], {}, "row 0"),
    "negative top_k": ([[[1]]], {"top_k": -1}, "from 1 to 10"),
    "large top_k": ([[[1]]], {"top_k": 11}, "from 1 to 10"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_invalid_parameter_value(model: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    cells, params, words = BAD[name]
    with pytest.raises(MlflowException, match=words) as caught:
        model.predict(pd.DataFrame({"image": pd.Series(cells, dtype=object)}), params=params)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    assert caught.value.get_http_status_code() == 400
    assert_one_line(caught.value.message)


def test_image_bomb(model: Any) -> None:
    """A picture of 64 megapixels, a few hundred kilobytes as a file."""
    from mlflow.exceptions import MlflowException

    bomb = png(np.zeros((8000, 8000), np.uint8))
    assert len(bomb) < 1_000_000
    with pytest.raises(MlflowException, match="50000000") as caught:
        model.predict(pd.DataFrame({"image": [bomb]}))
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_limits_that_a_deployment_sets(
    mlflow_model: Path, digits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("CNN_TUNING_MAX_PIXELS", "1600")
    monkeypatch.setenv("CNN_TUNING_MAX_IMAGES", "4")
    limited = mlflow.pyfunc.load_model(str(mlflow_model))
    pictures = [png(image[0]) for image in digits]
    assert len(limited.predict(pd.DataFrame({"image": pictures[:2]}))) == 2
    with pytest.raises(MlflowException, match="3 images of 2352 pixels in all: send at most 1600"):
        limited.predict(pd.DataFrame({"image": pictures[:3]}))
    with pytest.raises(MlflowException, match="8 images: send at most 4"):
        limited.predict(pd.DataFrame({"image": pictures}))


def test_equal_inputs_give_equal_bytes(bundle: Path, digits: np.ndarray, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pyfunc.save(bundle, tmp_path / name, digits[0])
    files = [
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("a", "b")
    ]
    assert files[0] == files[1]
    assert not [name for name in files[0] if "__pycache__" in name or name.endswith((".pkl", ".pickle"))]
    assert not [name for name, content in files[0].items() if str(tmp_path).encode() in content]
    assert str(Path(pyfunc.__file__).parents[3]).encode() not in files[0]["MLmodel"]


def test_signature_example_and_requirements(mlflow_model: Path) -> None:
    from mlflow.models import Model

    model = Model.load(str(mlflow_model))
    assert model.signature is not None and model.signature.inputs.input_names() == ["image"]
    assert model.signature.params is not None and model.signature.params.params[0].name == "top_k"
    assert (
        "image"
        in json.loads((mlflow_model / "serving_input_example.json").read_text())["dataframe_split"]["columns"]
    )
    lines = (mlflow_model / "requirements.txt").read_text().splitlines()
    assert all("==" in line and "+" not in line for line in lines)
    assert {line.partition("==")[0] for line in lines} >= {"mlflow", "numpy", "pillow", "safetensors", "torch"}


FRESH = """
import json, os, sys
sys.path.append(os.environ["PACKAGES"])
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
import cnn_tuning
import cnn_tuning.models.lab_cnn  # found through the package: its folder is not on the path any more
assert not any(place.startswith(sys.argv[1]) for place in sys.path), sys.path
texts = json.load(open(sys.argv[1] + "/serving_input_example.json"))["dataframe_split"]["data"]
answer = model.predict(pd.DataFrame(texts, columns=["image"]), params={"top_k": 2}).to_dict("records")
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"package": cnn_tuning.__file__, "answer": answer, "modules": modules}))
"""


def test_predicts_in_a_fresh_process_without_the_repository(
    mlflow_model: Path, bundle: Path, digits: np.ndarray, tmp_path: Path
) -> None:
    """-I and -S leave out the working folder, PYTHONPATH and .pth files, so the editable install is not there."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW"))},
        "PACKAGES": sysconfig.get_path("purelib"),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    command = [sys.executable, "-I", "-S"]
    guard = [*command, "-c", "import os, sys; sys.path.append(os.environ['PACKAGES']); import cnn_tuning"]
    hidden = subprocess.run(guard, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "No module named 'cnn_tuning'" in hidden.stderr, "the installed package must be out of reach"
    done = subprocess.run(
        [*command, "-B", "-c", FRESH, str(mlflow_model)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["package"]).is_relative_to(mlflow_model / "code")
    ((label, index, probability, choices),) = _expected(bundle, [digits[0, 0]], 2)
    (answer,) = result["answer"]
    assert (answer["label"], answer["index"]) == (label, index)
    assert answer["probability"] == pytest.approx(probability, abs=1e-6)
    assert [choice["label"] for choice in answer["top_k"]] == [choice[0] for choice in choices]
    assert not {"hydra", "omegaconf", "pytorch_lightning", "torchvision"} & set(result["modules"])


@pytest.mark.slow
def test_the_models_own_code_comes_before_an_installed_package(mlflow_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "installed" / "cnn_tuning"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise RuntimeError('another version was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(other.parent), "PACKAGES": sysconfig.get_path("purelib")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", FRESH, str(mlflow_model)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout.splitlines()[-1])["package"]).is_relative_to(mlflow_model / "code")


def test_a_loaded_model_is_not_in_the_way_of_other_processes(mlflow_model: Path, tmp_path: Path) -> None:
    """A model carries a part of the package; children that got its folder first would miss the rest."""
    import mlflow
    from PIL import Image

    from cnn_tuning.config import DataConfig, ImageConfig
    from cnn_tuning.data.prepare import prepare

    path = list(sys.path)
    mlflow.pyfunc.load_model(str(mlflow_model))
    assert sys.path == path
    for label in ("a", "b"):
        (tmp_path / "raw" / label).mkdir(parents=True)
        for number in range(150):
            Image.new("L", (4, 4), number).save(tmp_path / "raw" / label / f"{number}.png")
    config = DataConfig(name="made", format="image_folder", files={}, sources=(), image=ImageConfig((4, 4), 1))
    meta = prepare(config, tmp_path / "raw", tmp_path / "out", seed=0, workers=2)
    assert sum(map(sum, meta.counts.values())) == 300


def test_colour_model(tmp_path: Path) -> None:
    import mlflow

    make_bundle(tmp_path / "bundle", size=32, channels=3)
    image = np.random.default_rng(1).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    pyfunc.save(tmp_path / "bundle", tmp_path / "model", image)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    pixels = image.transpose(1, 2, 0)
    answer = model.predict(pd.DataFrame({"image": [_text(pixels), pixels.tolist()]}))
    assert _plain(answer) == _expected(tmp_path / "bundle", [pixels, pixels], 1)
