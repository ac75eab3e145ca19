"""A bundle and images in, labels with probabilities out: the one way to predict, behind every hop.

`evaluate`, the MLflow model, the folder predictor and the HTTP front all call this, so that the same image in
a batch of the same size gives the same bits everywhere on a CPU; a GPU's differ in the last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from cnn_tuning.data.images import MAX_PIXELS, BadImage, opened, to_input
from cnn_tuning.models import bundle as bundles

# Images in one pass through the network: memory stays bounded however many are asked for.
BATCH = 256

# An encoded picture, an array H×W or H×W×C, or one that is open.
Picture = bytes | np.ndarray | Image.Image
Result = TypeVar("Result")


@dataclass(frozen=True)
class Choice:
    """One class and its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable class of an image, and the `top_k` most probable, best first."""

    label: str
    index: int
    probability: float
    top_k: tuple[Choice, ...]


def fastest_device() -> str:
    """Return where many images are answered fastest: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class Predictor:
    """A trained network, ready on a device."""

    def __init__(self, bundle: Path, *, max_pixels: int = MAX_PIXELS, device: str = "cpu") -> None:
        self.network, self.specification = bundles.load(bundle, device)
        self.max_pixels, self.device = max_pixels, device

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names by index."""
        return self.specification.classes

    def prepare(self, image: Picture) -> np.ndarray:
        """Return a picture as the network's input: uint8 C×H×W.

        Raises:
            BadImage: it is not a readable picture, or has more than `max_pixels`.
        """
        return to_input(image, self.specification.image, max_pixels=self.max_pixels)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return float32 N×classes for uint8 N×C×H×W; each row adds up to 1."""
        parts = [self._softmax(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.float32)

    def _softmax(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), self._exactly():
            # A copy: torch refuses arrays it may not write to, such as a read-only memory map.
            logits = self.network(torch.from_numpy(np.array(images)).to(self.device))
            return torch.softmax(logits.float(), dim=1).cpu().numpy()

    def _exactly(self) -> AbstractContextManager[None]:
        """Have a GPU calculate with all digits of fp32, the same way each time."""
        if self.device == "cpu":
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)

    def predict(self, images: Sequence[Picture], top_k: int = 1) -> list[Prediction]:
        """Return one prediction per image.

        Raises:
            BadImage: names the row of the first unreadable image.
        """
        return self.choose(self.probabilities(self.prepare_all(images)), top_k)

    def open_all(self, images: Sequence[Picture]) -> list[Image.Image]:
        """Return images for `prepare_all`, their sizes known and nothing decoded; `BadImage` names the row."""
        return [_of_row(row, opened, image, max_pixels=self.max_pixels) for row, image in enumerate(images)]

    def prepare_all(self, images: Sequence[Picture]) -> np.ndarray:
        """Return images as one array N×C×H×W, uint8; `BadImage` names the row."""
        prepared = np.empty((len(images), *self.specification.shape), np.uint8)
        for row, image in enumerate(images):
            prepared[row] = _of_row(row, self.prepare, image)
        return prepared

    def choose(self, probabilities: np.ndarray, top_k: int = 1) -> list[Prediction]:
        """Return the predictions that rows of N×classes stand for; equal probabilities keep class order."""
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [self._prediction(row, best) for row, best in zip(probabilities, order, strict=True)]

    def _prediction(self, row: np.ndarray, best: np.ndarray) -> Prediction:
        choices = tuple(Choice(self.classes[index], int(index), float(row[index])) for index in best)
        return Prediction(choices[0].label, choices[0].index, choices[0].probability, choices)


def _of_row(row: int, work: Callable[..., Result], image: Picture, **options: Any) -> Result:
    try:
        return work(image, **options)
    except BadImage as error:
        raise BadImage(f"row {row}: {error}") from None
