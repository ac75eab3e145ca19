"""A folder of pictures (or s3://bucket/prefix) in, a CSV of predictions out: `cnn-tuning predict SOURCE`.

Pictures are read and decoded by threads while the network works on the batch before; at most two batches are
in memory. The CSV appears under its name only when it is complete.
"""

from __future__ import annotations

import csv
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cnn_tuning.data.images import BadImage
from cnn_tuning.errors import UserError
from cnn_tuning.serving.inputs import check_top_k
from cnn_tuning.serving.pictures import Source, open_source
from cnn_tuning.serving.predictor import Prediction, Predictor


@dataclass(frozen=True)
class Summary:
    """How many pictures got a prediction, and how many an error."""

    predicted: int
    unreadable: int


def predict_folder(
    predictor: Predictor, source: str, out: Path, *, top_k: int = 1, batch_size: int = 256
) -> Summary:
    """Write one CSV row per file of `source`: path, label, index, probability, further answers, error.

    A byte of a file's name that is not UTF-8 is written as `\\udc` and its two hexadecimal digits.

    Raises:
        UserError: there is no such source, it holds nothing, or `out` cannot be written; nothing is left behind.
    """
    top_k = check_top_k(top_k, len(predictor.classes))
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: give at least 1")
    if out.is_dir():
        raise UserError(f"{out}: is a folder: give the name of a CSV file to --out")
    pictures = open_source(source)
    # Beside `out`, so that it can take its place at once, under a name that no other run writes to.
    partial = out.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("x", newline="", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}): give another --out") from None
    try:
        with file:
            summary = _write(predictor, pictures, csv.writer(file), top_k, batch_size)
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)
    return summary


def _write(predictor: Predictor, pictures: Source, table: Any, top_k: int, batch_size: int) -> Summary:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    further = [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "probability")]
    table.writerow(["path", "label", "index", "probability", *further, "error"])
    columns = (
        TextColumn("predict"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    predicted = unreadable = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("predict", total=pictures.count(), note="")
        for paths, prepared in _batches(predictor, pictures, batch_size):
            good = [image for image in prepared if isinstance(image, np.ndarray)]
            answers = iter(predictor.choose(predictor.probabilities(np.stack(good)), top_k) if good else ())
            for path, image in zip(paths, prepared, strict=True):
                failed = isinstance(image, str)
                table.writerow(
                    [
                        path,
                        *([""] * (3 + len(further)) if failed else _cells(next(answers))),
                        image if failed else "",
                    ]
                )
            predicted, unreadable = predicted + len(good), unreadable + len(prepared) - len(good)
            progress.update(task, advance=len(paths), note=f"{unreadable} unreadable" if unreadable else "")
    if not predicted and not unreadable:
        raise UserError(f"{pictures.name}: holds no files to predict on")
    return Summary(predicted, unreadable)


def _batches(
    predictor: Predictor, pictures: Source, size: int
) -> Iterator[tuple[list[str], list[np.ndarray | str]]]:
    """Yield paths with their inputs (or the reason there is none), the next batch already being read."""

    def prepared(path: str) -> np.ndarray | str:
        try:
            return predictor.prepare(pictures.read(path))
        except BadImage as error:
            return " ".join(str(error).split())

    paths = iter(pictures.paths())
    with ThreadPoolExecutor(pictures.threads) as pool:
        waiting: tuple[list[str], list[Future[np.ndarray | str]]] | None = None
        try:
            while group := list(islice(paths, size)):
                following = group, [pool.submit(prepared, path) for path in group]
                if waiting:
                    yield waiting[0], [future.result() for future in waiting[1]]
                waiting = following
            if waiting:
                yield waiting[0], [future.result() for future in waiting[1]]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _cells(prediction: Prediction) -> list[Any]:
    cells: list[Any] = [prediction.label, prediction.index, prediction.probability]
    for choice in prediction.top_k[1:]:
        cells += [choice.label, choice.probability]
    return cells
