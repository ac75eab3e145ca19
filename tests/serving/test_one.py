"""One picture on the terminal: every class once, sorted, and whether the answer is right."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from live import png

from cnn_tuning.cli import cli
from cnn_tuning.errors import UserError
from cnn_tuning.serving.predictor import Predictor


def _told(bundle: Path, picture: Path, *options: str) -> str:
    done = CliRunner().invoke(cli, ["predict", str(picture), "--model", str(bundle), *options])
    if done.exception:
        raise done.exception
    return done.output


def test_all_classes_are_told_with_the_most_probable_first(
    bundle: Path, digits: np.ndarray, tmp_path: Path
) -> None:
    answer = Predictor(bundle).predict([digits[0][0]], top_k=10)[0]
    folder = tmp_path / answer.label
    folder.mkdir()
    (folder / "picture.png").write_bytes(png(digits[0][0]))
    told = _told(bundle, folder / "picture.png")
    rows = re.findall(r"^ *(\d+) +(\S+) +([\d.]+)%", told, re.MULTILINE)
    assert [label for _, label, _ in rows] == [choice.label for choice in answer.top_k]
    shown = [float(share) for *_, share in rows]
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) == pytest.approx(100, abs=0.01)
    assert told.rstrip().endswith(": right")  # the folder says what it is
    other = answer.top_k[1].label
    assert _told(bundle, folder / "picture.png", "--label", other).rstrip().endswith(f"wrong, it is {other}")
    (tmp_path / "alone.png").write_bytes(png(digits[0][0]))
    assert not re.search("right|wrong", _told(bundle, tmp_path / "alone.png").rsplit(" by ", 1)[1])


def test_what_cannot_be_told_is_a_line(bundle: Path, digits: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text.png: not an image of a known format"):
        _told(bundle, tmp_path / "text.png")
    (tmp_path / "picture.png").write_bytes(png(digits[0][0]))
    with pytest.raises(UserError, match="no such class"):
        _told(bundle, tmp_path / "picture.png", "--label", "eleven")
