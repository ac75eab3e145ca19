"""One picture in; all classes with their probabilities, and whether the answer is right, on the terminal."""

from __future__ import annotations

import difflib
from pathlib import Path

from cnn_tuning.data.images import BadImage
from cnn_tuning.errors import UserError
from cnn_tuning.serving.predictor import Prediction, Predictor

BAR = 30


def print_prediction(predictor: Predictor, picture: Path, label: str | None, model: str) -> None:
    """Print each class with its probability, the most probable first, then the answer.

    `label` is the true class; without one, the name of the picture's folder counts where it is a class.

    Raises:
        UserError: the file is no readable picture, or there is no such class.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    truth = _truth(predictor.classes, picture, label)
    answer = _answer(predictor, picture)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    for rank, choice in enumerate(answer.top_k, start=1):
        style = "bold" if choice.label == truth else ""
        mark = " ← its class" if choice.label == truth else ""
        bar = "█" * round(choice.probability * BAR)
        table.add_row(f"{rank}", Text(choice.label, style), f"{choice.probability:8.3%}", Text(bar + mark, style))
    console = Console(highlight=False)
    console.print(table)
    verdict = "" if truth is None else ": right" if truth == answer.label else f": wrong, it is {truth}"
    told = f"{picture}: {answer.label} ({answer.probability:.2%}) by {model}{verdict}"
    console.print(Text(told), soft_wrap=True)


def _truth(classes: tuple[str, ...], picture: Path, label: str | None) -> str | None:
    if label is not None and label not in classes:
        close = difflib.get_close_matches(label, classes, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(classes[:10])}"
        raise UserError(f"--label {label}: no such class; {hint}")
    folder = picture.resolve().parent.name
    return label if label is not None else folder if folder in classes else None


def _answer(predictor: Predictor, picture: Path) -> Prediction:
    try:
        return predictor.predict([picture.read_bytes()], top_k=len(predictor.classes))[0]
    except (BadImage, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix("row 0: ")
        raise UserError(f"{picture}: {reason}") from None
