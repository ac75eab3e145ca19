"""Stratified splits, for any labels."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_tuning.config import DataConfig, ImageConfig
from cnn_tuning.data.splits import assign, stratified
from cnn_tuning.errors import UserError

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(0, 2), st.integers(0, 400), st.integers(0, 2**31 - 1))
def test_stratified_keeps_proportions_and_spares(sizes, spare, count, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    try:
        chosen = stratified(labels, count, np.random.default_rng(seed), "key", spare)
    except UserError as error:
        assert str(error).startswith("key")
        assert count < len(sizes) or count > sum(sizes) - spare * len(sizes) or min(sizes) <= spare
        return
    assert len(chosen) == count == len(set(chosen)) and (np.diff(chosen) > 0).all()
    got = np.bincount(labels[chosen], minlength=len(sizes))
    exact = count * np.array(sizes) / sum(sizes)
    assert (got >= 1).all() and (got <= np.array(sizes) - spare).all()
    if (exact >= 1).all() and (exact <= np.array(sizes) - spare - 1).all():
        assert np.abs(got - exact).max() < 1
    again = stratified(labels, count, np.random.default_rng(seed), "key", spare)
    assert np.array_equal(chosen, again)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=8),
    st.booleans(), st.booleans(),
    st.floats(0.01, 0.9), st.floats(0.01, 0.9), st.one_of(st.none(), st.integers(1, 200)),
)  # fmt: skip
def test_splits_are_disjoint_and_complete_or_a_clear_error(sizes, has_val, has_test, val, test, limit):
    names = [f"class {i}" for i in range(len(sizes))]
    labels = {"train": np.repeat(np.arange(len(sizes)), sizes)}
    labels |= {k: np.arange(len(sizes)) for k, has in (("val", has_val), ("test", has_test)) if has}
    config = DataConfig(
        "made", "npz", {}, (), ImageConfig((2, 2), 1), val_fraction=val, test_fraction=test, limit=limit
    )
    try:
        picks = assign(labels, names, config, 0)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert list(picks) == ["train", "val", "test"]
    drawn = np.concatenate([indices for source, indices in picks.values() if source == "train"])
    assert len(drawn) == len(set(drawn)) == min(limit or sum(sizes), sum(sizes))
    for split, (source, indices) in picks.items():
        assert source == (split if split in labels else "train")
        assert set(labels[source][indices]) == set(range(len(sizes))), "every class in every split"
