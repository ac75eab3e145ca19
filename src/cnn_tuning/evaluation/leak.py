"""Whether test images were seen in training: prepared data and answers in, how many and what that flatters out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.repeats import digests_of, image_digests


@dataclass(frozen=True)
class Leak:
    """Test images that are in the training or validation split, too, byte for byte as prepared.

    `images` of `count`; `without`: each model's accuracy on the others (empty where none are left).
    `unknown`: why it was not looked for, else empty.
    """

    images: int
    count: int
    without: Mapping[str, float]
    unknown: str = ""

    @property
    def sentence(self) -> str:
        """Return it as a person reads it."""
        if self.unknown:
            return f"not evaluated: {self.unknown}"
        if not self.images:
            return f"none of {self.count:,}"
        others = ", ".join(f"{name} {accuracy:.2%}" for name, accuracy in self.without.items())
        on_others = f"; accuracy on the others: {others}" if others else ""
        return f"{self.images:,} of {self.count:,} ({self.images / self.count:.2%}), which flatters{on_others}"


def find_leak(data: PackedData, answers: Mapping[str, NDArray[np.int64]]) -> Leak:
    """Compare each test image with all of the training and validation splits; `answers`: class index by image.

    A host that streams the training split has no images of it: there nothing is compared.
    """
    test = data.split("test")
    if not (data.path / "train").exists():
        return Leak(0, len(test), {}, unknown=f"no training images in {data.path}")
    seen = np.concatenate([digests_of(data, name) for name in ("train", "val")])
    new = ~np.isin(image_digests(test.images), seen)
    right = {name: own[new] == test.labels[new] for name, own in answers.items()}
    return Leak(
        images=int((~new).sum()),
        count=len(test),
        without={name: float(own.mean()) for name, own in right.items()} if new.any() else {},
    )
