"""Inputs: every value is either taken or refused with one line; nothing else comes out."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.serving import inputs
from cnn_tuning.serving.inputs import BadRequest

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
FORMS = st.sampled_from(["inputs", "instances", "dataframe_split", "dataframe_records"])


@given(ANYTHING)
def test_any_value_is_an_image_or_refused(value: object) -> None:
    try:
        image = inputs.as_image(value, 3)
    except BadRequest as error:
        assert "row 3" in str(error) and "\n" not in str(error)
    else:
        assert isinstance(image, (bytes, np.ndarray))


@given(st.dictionaries(FORMS | st.just("params"), ANYTHING, max_size=2) | ANYTHING)
def test_any_payload_gives_rows_or_is_refused(payload: object) -> None:
    try:
        rows = inputs.rows_of(payload)
    except BadRequest as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(rows, list)


@given(st.binary(min_size=1))
def test_base64_comes_back(content: bytes) -> None:
    text = base64.b64encode(content).decode()
    assert inputs.as_image(text, 0) == content
    assert inputs.as_image(f"data:image/png;base64,{text}", 0) == content
    assert inputs.as_image(f" {text[:3]}\n{text[3:]} ", 0) == content


@pytest.mark.parametrize(
    "payload",
    [
        {"inputs": ["a", "b"]},
        {"instances": ["a", "b"]},
        {"inputs": {"image": ["a", "b"]}},
        {"inputs": [{"image": "a"}, {"image": "b"}]},
        {"dataframe_records": [{"image": "a"}, {"image": "b"}]},
        {"dataframe_split": {"columns": ["image"], "index": [4, 5], "data": [["a"], ["b"]]}},
    ],
)
def test_each_form_gives_the_same_rows(payload: dict) -> None:
    assert inputs.rows_of(payload) == ["a", "b"]


@given(st.integers() | st.floats() | st.text(max_size=3) | st.booleans())
def test_top_k_is_within_the_classes(value: object) -> None:
    try:
        assert 1 <= inputs.check_top_k(value, 10) <= 10
    except BadRequest as error:
        assert "from 1 to 10" in str(error)


def test_top_k_defaults_to_one() -> None:
    assert inputs.check_top_k(None, 10) == 1
