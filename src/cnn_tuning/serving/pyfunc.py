"""The MLflow model around a bundle: a column of images in, label, index, probability and top-k out.

`save` writes a folder that loads and predicts without this repository: it carries the package's source, the
bundle (no pickle), exact requirements, a signature and an example.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

import cnn_tuning
from cnn_tuning.data.images import MAX_PIXELS
from cnn_tuning.errors import UserError
from cnn_tuning.models.bundle import MODEL
from cnn_tuning.serving import inputs
from cnn_tuning.serving.predictor import Predictor

# Distributions that the code on the way from a request to an answer imports.
REQUIREMENTS = (
    *("mlflow", "numpy", "pandas", "pydantic", "pyyaml", "safetensors", "torch"),
    *("pillow", "simplejpeg"),
)
# With them the stock server's requests take a tenth of the time where it has several workers.
OF_SERVER = ("uvloop", "httptools")
# timm's networks import torchvision, too.
OF_LIBRARY = {"timm": ("timm", "torchvision"), "torchvision": ("torchvision",)}

# The part of the package that is shipped inside the model.
CODE = (
    *("__init__.py", "errors.py", "machine.py", "config", "models", "data/__init__.py", "data/images.py"),
    *("serving/__init__.py", "serving/inputs.py", "serving/predictor.py", "serving/pyfunc.py"),
)

_CHOICE = Object(
    [
        Property("label", DataType.string),
        Property("index", DataType.long),
        Property("probability", DataType.double),
    ]
)
SIGNATURE = ModelSignature(
    # Any: base64 text, bytes or nested rows of numbers; `inputs` checks and names what is wrong.
    inputs=Schema([ColSpec(AnyType(), inputs.COLUMN)]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "label"),
            ColSpec(DataType.long, "index"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Array(_CHOICE), "top_k"),
        ]
    ),
    params=ParamSchema([ParamSpec("top_k", DataType.long, 1)]),
)


class ImageClassifier(PythonModel):
    """Predicts with the bundle among its artifacts; every bad input is INVALID_PARAMETER_VALUE in one line."""

    def load_context(self, context: Any) -> None:
        """Load the network."""
        bundle = Path(context.artifacts["bundle"])
        self.limits = limits = {name: int(os.environ[name]) for name in inputs.LIMITS if name in os.environ}
        self.predictor = Predictor(bundle, max_pixels=limits.get(inputs.PIXELS_LIMIT, MAX_PIXELS))
        _forget_code(bundle.parents[1])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return one row per image: label, index, probability, top_k (a list of the same three)."""
        try:
            images = inputs.as_images(_cells(model_input))
            top_k = inputs.check_top_k((params or {}).get("top_k"), len(self.predictor.classes))
            predictions = self.predictor.predict(self._within_limits(images), top_k)
        except UserError as error:
            line = " ".join(str(error).split())
            raise MlflowException(line, error_code=INVALID_PARAMETER_VALUE) from None
        columns = ["label", "index", "probability", "top_k"]
        rows = [
            {**asdict(prediction), "top_k": [asdict(c) for c in prediction.top_k]} for prediction in predictions
        ]
        return pd.DataFrame(rows, columns=columns)

    def _within_limits(self, images: Sequence[bytes | np.ndarray]) -> Sequence[Any]:
        """Refuse more images, or pixels of them together, than a request may hold where this is deployed."""
        most, pixels = self.limits.get(inputs.IMAGES_LIMIT), self.limits.get(inputs.PIXELS_LIMIT)
        if most is not None and len(images) > most:
            raise inputs.BadRequest(f"{len(images)} images: send at most {most} a request")
        if pixels is None:
            return images
        pictures = self.predictor.open_all(images)
        total = sum(picture.width * picture.height for picture in pictures)
        if total > pixels:
            line = f"{len(images)} images of {total} pixels in all: send at most {pixels} pixels a request"
            raise inputs.BadRequest(line)
        return pictures


def save(bundle: Path, out: Path, example: np.ndarray) -> None:
    """Write the MLflow model of `bundle` to the new folder `out`; equal inputs give equal bytes.

    Args:
        example: one image, uint8 C×H×W, shown to users as base64 of a PNG.
    """
    text = base64.b64encode(_png(example)).decode()
    # A stage empties that folder when it starts: nothing stays of one that was killed.
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        package = _package_source(Path(scratch) / "cnn_tuning")
        carried = shutil.copytree(bundle, Path(scratch) / "bundle")
        mlflow.pyfunc.save_model(
            path=str(out),
            python_model=str(Path(__file__).with_name("model_code.py")),
            artifacts={"bundle": str(carried)},
            code_paths=[str(package)],
            signature=SIGNATURE,
            input_example=(pd.DataFrame({inputs.COLUMN: [text]}), {"top_k": 1}),
            pip_requirements=[_pinned(name) for name in _requirements(bundle)],
            mlflow_model=_identity(carried, package),
        )
    _drop_local_paths(out / "MLmodel")


def _requirements(bundle: Path) -> list[str]:
    """Return the distributions that this bundle needs: a library of networks only for a backbone."""
    server = [name for name in OF_SERVER if find_spec(name) is not None]
    model = json.loads((bundle / MODEL).read_text())["model"]
    if model["architecture"] != "backbone":
        return [*REQUIREMENTS, *server]
    return [*REQUIREMENTS, *server, *OF_LIBRARY[model["arguments"].get("library", "timm")]]


def _pinned(name: str) -> str:
    pinned = f"{name}=={version(name).partition('+')[0]}"
    return f"{pinned};sys_platform!='win32'" if name == "uvloop" else pinned


def _forget_code(model: Path) -> None:
    """Take the model's code out of `sys.path` again, where MLflow has put it first.

    What is imported stays, and its submodules are found through it. Left there, the folder would reach every
    process that this one starts, and hide the whole package, of which it holds a part.
    """
    code = (model / "code").resolve()
    sys.path[:] = [place for place in sys.path if not place or Path(str(place)).resolve() != code]


def _cells(model_input: Any) -> list[Any]:
    """Return the cells of the image column.

    MLflow's scoring server puts a list of texts from `{"inputs": [...]}` into one cell: it is taken apart here.
    """
    if not isinstance(model_input, pd.DataFrame) or inputs.COLUMN not in model_input.columns:
        raise inputs.BadRequest(f"send a table with the one column {inputs.COLUMN!r}; {inputs.WANTED}")
    extra = [str(column) for column in model_input.columns if column != inputs.COLUMN]
    if extra:
        raise inputs.BadRequest(f"unknown column {extra[0][:40]!r}: send only the column {inputs.COLUMN!r}")
    cells = model_input[inputs.COLUMN].tolist()
    if len(cells) == 1 and isinstance(cells[0], list) and all(isinstance(cell, str) for cell in cells[0]):
        return cells[0]
    return cells


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _package_source(target: Path) -> Path:
    """Copy the source that prediction needs, and only that, to `target`."""
    package = Path(cnn_tuning.__file__).parent
    for part in CODE:
        for file in sorted((package / part).rglob("*.py")) or [package / part]:
            copy = target / file.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return target


def _drop_local_paths(description: Path) -> None:
    """Take out of `MLmodel` where on this machine the parts came from; nothing reads it."""
    import yaml

    content = yaml.safe_load(description.read_text())
    flavor = content["flavors"]["python_function"]
    flavor["artifacts"]["bundle"]["uri"] = flavor["artifacts"]["bundle"]["path"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    description.write_text(yaml.safe_dump(content))


def _identity(*folders: Path) -> Model:
    """Return the model's metadata, with an identity made of its content instead of chance and the clock."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    identity = uuid.UUID(bytes=digest.digest()[:16], version=4).hex
    return Model(model_uuid=identity, utc_time_created="2000-01-01 00:00:00.000000")
