"""What a caller may send (base64 text, data: URLs, bytes, arrays of numbers) -> what the predictor takes.

Every refusal is one line that says which row is wrong and what to send instead. Shared by the MLflow model
and the HTTP front, so that both take, and refuse, the same.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cnn_tuning.errors import UserError

COLUMN = "image"
# Environment variables with limits of a request, for where MLflow's own server is what others reach.
IMAGES_LIMIT, PIXELS_LIMIT = LIMITS = ("CNN_TUNING_MAX_IMAGES", "CNN_TUNING_MAX_PIXELS")
WANTED = "send base64 of a PNG or JPEG, or rows of pixels (height × width, or height × width × 3; 0-255)"


class BadRequest(UserError):
    """An input that cannot be predicted on; the message is one line for whoever sent it."""


def as_images(values: Iterable[Any]) -> list[bytes | np.ndarray]:
    """Return each value as encoded bytes or an array of numbers; the first bad one raises `BadRequest`."""
    images = [as_image(value, row) for row, value in enumerate(values)]
    if not images:
        raise BadRequest(f"no images: the column {COLUMN!r} has no rows; {WANTED}")
    return images


def as_image(value: Any, row: int) -> bytes | np.ndarray:
    """Return one value as encoded bytes or as an array of numbers H×W or H×W×C.

    Raises:
        BadRequest: names `row`.
    """
    if isinstance(value, str):
        return _decoded(value, row)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        return _array(value, row)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise BadRequest(f"row {row}: the image is missing; {WANTED}")
    raise BadRequest(f"row {row}: {type(value).__name__} is no image; {WANTED}")


def check_top_k(value: Any, classes: int) -> int:
    """Return `value` as a number of answers from 1 to `classes`; None is 1."""
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= classes:
        raise BadRequest(f"top_k: got {_short(value)}, send a whole number from 1 to {classes}")
    return int(value)


def rows_of(payload: Any) -> list[Any]:
    """Return the `image` values of a request in one of MLflow's JSON forms, as `as_images` takes them."""
    forms = ("inputs", "instances", "dataframe_split", "dataframe_records")
    if not isinstance(payload, Mapping):
        raise BadRequest(f'the JSON is no object: send {{"inputs": [...]}}; {WANTED}')
    unknown = [key for key in payload if key not in (*forms, "params")]
    if unknown:
        raise BadRequest(f"unknown field {_short(unknown[0])}: send one of {', '.join(forms)}, and params")
    present = [form for form in forms if form in payload]
    if len(present) != 1:
        raise BadRequest(f"send exactly one of {', '.join(forms)}; got {', '.join(present) or 'none'}")
    form = present[0]
    if form == "dataframe_split":
        return _from_split(payload[form])
    if form == "dataframe_records" or _is_records(payload[form]):
        return _from_records(payload[form], form)
    return _from_values(payload[form], form)


def _from_split(table: Any) -> list[Any]:
    shape = f'dataframe_split: send {{"columns": ["{COLUMN}"], "data": [["..."]]}}'
    if not isinstance(table, Mapping) or set(table) - {"columns", "data", "index"}:
        raise BadRequest(shape)
    columns, data = table.get("columns"), table.get("data")
    if not isinstance(columns, list) or not isinstance(data, list):
        raise BadRequest(shape)
    _check_columns(columns, "dataframe_split")
    for number, cells in enumerate(data):
        if not isinstance(cells, list) or len(cells) != 1:
            raise BadRequest(f"row {number}: send one cell a row of dataframe_split, the image")
    return [cells[0] for cells in data]


def _from_records(records: Any, form: str) -> list[Any]:
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise BadRequest(f'{form}: send a list of {{"{COLUMN}": ...}}')
    for record in records:
        _check_columns(list(record), form)
    return [record[COLUMN] for record in records]


def _from_values(values: Any, form: str) -> list[Any]:
    if isinstance(values, Mapping):
        _check_columns(list(values), form)
        values = values[COLUMN]
    if not isinstance(values, list):
        raise BadRequest(f"{form}: expected a list of images, got {type(values).__name__}; {WANTED}")
    return values


def _is_records(values: Any) -> bool:
    return isinstance(values, list) and any(isinstance(value, Mapping) for value in values)


def _check_columns(columns: list[Any], form: str) -> None:
    if columns == [COLUMN]:
        return
    extra = [column for column in columns if column != COLUMN]
    what = f"unknown column {_short(extra[0])}" if extra else f"{len(columns)} columns"
    raise BadRequest(f"{form}: {what}: send only the column {COLUMN!r}")


def _decoded(text: str, row: int) -> bytes:
    """Return the bytes behind base64 text or a `data:image/png;base64,…` URL (RFC 2397)."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadRequest(f"row {row}: this is no data: URL of base64; send data:image/png;base64,...")
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"row {row}: the text is not base64; {WANTED}") from None
    if not content:
        raise BadRequest(f"row {row}: the image is empty; {WANTED}")
    return content


def _array(value: Any, row: int) -> np.ndarray:
    """Return nested rows as an array of numbers; shape and range are the predictor's to check."""
    try:
        # A pandas cell may hold arrays of arrays (dtype object): lists all the way down settle it.
        array = np.asarray(value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value)
    except (ValueError, OverflowError):
        raise BadRequest(f"row {row}: the rows of the image differ in length; {WANTED}") from None
    if array.dtype.kind not in "uif" or array.ndim not in (2, 3):
        what = f"shape {array.shape}" if array.dtype.kind in "uif" else "something that is no number"
        raise BadRequest(f"row {row}: the image has {what}; {WANTED}")
    return array


def _short(value: Any, limit: int = 40) -> str:
    """Return `value` as short printable text in one line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
