"""A folder of pictures (or s3://bucket/prefix) in, a CSV of predictions out: `cnn-tuning predict SOURCE`.

Pictures are read and decoded by threads while the network works on the batch before; at most two batches are
in memory. The CSV appears under its name only when it is complete.
"""

from __future__ import annotations

import csv
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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


def header(top_k: int) -> list[str]:
    """Return the names of the table's columns."""
    further = [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "probability")]
    return ["path", "label", "index", "probability", *further, "error"]


def _write(predictor: Predictor, pictures: Source, table: Any, top_k: int, batch_size: int) -> Summary:
    table.writerow(header(top_k))
    predicted = unreadable = 0
    with progress(pictures.count()) as advance:
        for answers in answered(predictor, pictures, pictures.paths(), top_k, batch_size):
            table.writerows(answers.rows)
            predicted += len(answers.rows) - len(answers.failed)
            unreadable += len(answers.failed)
            advance(len(answers.rows), f"{unreadable} unreadable" if unreadable else "")
    if not predicted and not unreadable:
        raise UserError(f"{pictures.name}: holds no files to predict on")
    return Summary(predicted, unreadable)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """Show a bar with the time that is left; yield what moves it: by a number of pictures, with a note."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    note = TextColumn("{task.fields[note]}")
    columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("predict", total=total, note="")

        def advance(count: int, note: str) -> None:
            bar.update(task, advance=count, note=note)

        yield advance


@dataclass(frozen=True)
class Answers:
    """Rows of the table for one batch, and what failed of it: path → reason."""

    rows: list[list[Any]]
    failed: dict[str, BadImage]


def answered(
    predictor: Predictor, pictures: Source, paths: Iterable[str], top_k: int, batch_size: int
) -> Iterator[Answers]:
    """Yield the answers to `paths` batch by batch, a row for each."""
    blanks = [""] * (len(header(top_k)) - 2)
    for group, prepared in _batches(predictor, pictures, paths, batch_size):
        good = [image for image in prepared if isinstance(image, np.ndarray)]
        answers = iter(predictor.choose(predictor.probabilities(np.stack(good)), top_k) if good else ())
        rows: list[list[Any]] = []
        failed: dict[str, BadImage] = {}
        for path, image in zip(group, prepared, strict=True):
            if isinstance(image, BadImage):
                failed[path] = image
                rows.append([path, *blanks, " ".join(str(image).split())])
            else:
                rows.append([path, *_cells(next(answers)), ""])
        yield Answers(rows, failed)


def _batches(
    predictor: Predictor, pictures: Source, paths: Iterable[str], size: int
) -> Iterator[tuple[list[str], list[np.ndarray | BadImage]]]:
    """Yield paths with their inputs (or the reason there is none), the next batch already being read."""

    def prepared(path: str) -> np.ndarray | BadImage:
        try:
            return predictor.prepare(pictures.read(path))
        except BadImage as error:
            return error

    remaining = iter(paths)
    with ThreadPoolExecutor(pictures.threads) as pool:
        waiting: tuple[list[str], list[Future[np.ndarray | BadImage]]] | None = None
        try:
            while group := list(islice(remaining, size)):
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
