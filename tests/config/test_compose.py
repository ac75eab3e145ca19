"""Configuration as a person meets it: what composes, what is refused, and how it is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from composing import in_project, refusal  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_tuning import config
from cnn_tuning.config import (
    Config,
    Recipe,
    compose,
    flatten,
    load_locked,
    lock_text,
    patch,
    select,
    to_plain,
    validate,
)
from cnn_tuning.errors import UserError

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_validates(name):
    composed = compose([f"experiment={name}"])
    assert composed.experiment == name
    head = (ROOT / f"conf/experiment/{name}.yaml").read_text().splitlines()
    assert head[0] == "# @package _global_"
    assert head[1].startswith("# ")
    assert name in head[1] or "dvc repro" in head[1]
    assert any(line.startswith(("# Expected: ", "# Not measured: ")) for line in head)


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("*/*.yaml")), ids=str)
def test_an_option_is_named_as_its_file(file):
    if file.parent.name == "experiment":
        return
    tree = yaml.safe_load(file.read_text())
    if file.parent.name == "ablation":
        assert list(tree["questions"]) == [] if file.stem == "none" else [file.stem]
    else:
        assert tree["name"] == file.stem


def test_what_is_locked_is_read_back_alike(tmp_path):
    composed = compose(["experiment=digits", "optimizer.learning_rate=1e-3", "trainer.early_stopping.patience=2"])
    lock = tmp_path / "params.lock.yaml"
    lock.write_text(lock_text(composed))
    assert load_locked(Config, lock) == composed
    recipe = load_locked(Recipe, lock)
    assert recipe.optimizer.learning_rate == 0.001
    assert not hasattr(recipe, "data")


def test_params_yaml_chooses_and_sets(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text(
        "experiment: digits\nseed: 7\nmodel: {name: lab_cnn, dropout: both}\n"
        "optimizer: sgd\ntrainer: {max_epochs: 3, early_stopping: {patience: 2}}\n"
    )
    composed = compose(params=params)
    assert (composed.data.name, composed.seed) == ("digits", 7)
    assert (composed.model.name, composed.model.dropout) == ("lab_cnn", "both")
    assert (composed.optimizer.name, composed.trainer.max_epochs) == ("sgd", 3)
    assert composed.trainer.early_stopping.patience == 2


def test_a_command_line_wins_over_params_yaml(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("experiment: digits\nseed: 1\nmodel: {dropout: both}\n")
    composed = compose(["seed=2", "model=lab_cnn"], params=params)
    assert composed.seed == 2
    assert (composed.model.name, composed.model.dropout) == ("lab_cnn", "both")


@settings(max_examples=40)
@given(
    rate=st.floats(1e-6, 10, allow_nan=False),
    epochs=st.integers(1, 10_000),
    seed=st.integers(0, 2**31 - 1),
    dropout=st.sampled_from(["none", "conv", "dense", "both"]),
)
def test_any_valid_value_survives_patch_and_lock(rate, epochs, seed, dropout):
    base = _base()
    changes = {
        "optimizer.learning_rate": rate,
        "trainer.max_epochs": epochs,
        "seed": seed,
        "model.dropout": dropout,
    }
    patched = patch(base, changes)
    plain = yaml.safe_load(lock_text(patched))
    assert validate(Config, plain) == patched
    assert {k: flatten(to_plain(patched))[k] for k in changes} == changes


def test_patch_refuses_a_wrong_name():
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        patch(_base(), {"optimizer.learning_rat": 0.1})


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _base().seed = 3


_cache: list[Config] = []


def _base() -> Config:
    if not _cache:
        _cache.append(compose(["experiment=digits"], conf=ROOT / config.CONF, params=ROOT / config.PARAMS))
    return _cache[0]


def test_what_a_yaml_leaves_out_has_the_schemas_default_and_can_be_set(tmp_path):
    import shutil

    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    (conf / "data/own.yaml").write_text(
        "name: own\nformat: image_folder\nfiles: {}\nsources: [{uri: 'file:photos/'}]\n"
        "image: {size: [32, 32], channels: 3}\n"
    )
    (conf / "schedule/cosine.yaml").write_text("name: cosine\n")
    own = compose(["data=own", "data.limit=5", "schedule=cosine", "schedule.warmup_epochs=2"], conf=conf)
    assert (own.data.limit, own.data.image.resize, own.data.bad_images) == (5, "crop", "drop")
    assert (own.schedule.warmup_epochs, own.schedule.final_fraction) == (2, 0.0)
    assert "did you mean 'limit'" in refusal(["data=own", "data.limt=5"], conf=conf)


@pytest.mark.parametrize(
    ("configured", "told", "counts"),
    [(0, "0.42", 0.42), (0, "", 0.0), (0.1, "0.42", 0.42), (0.1, "", 0.1), (0.1, "0", 0.0)],
)
def test_a_rented_host_gives_its_own_price(tmp_path, monkeypatch, configured, told, counts):
    lock = tmp_path / "params.lock.yaml"
    composed = compose([f"tracking.price_per_hour={configured}"], params=None)
    monkeypatch.setenv("CNN_TUNING_PRICE_PER_HOUR", told)
    again = compose([f"tracking.price_per_hour={configured}"], params=None)
    assert lock_text(again) == lock_text(composed)  # no parameter: nothing runs again for it
    lock.write_text(lock_text(composed))
    assert load_locked(Config, lock).tracking.price_per_hour == counts
    assert select(Config, composed).tracking.price_per_hour == counts
    assert load_locked(Recipe, lock) == select(Recipe, composed)


def test_a_price_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv("CNN_TUNING_PRICE_PER_HOUR", "much")
    with pytest.raises(UserError, match="CNN_TUNING_PRICE_PER_HOUR: got 'much', must be US dollars per hour"):
        select(Config, _base())


@pytest.mark.parametrize(
    "costly",
    [
        "search.budget.dollars=1",
        "search={objectives: [{metric: cost/usd, direction: minimize}], pruner: {name: none}}",
    ],
)
def test_a_search_for_money_needs_a_price_of_either_kind(monkeypatch, costly):
    search = ["experiment=digits", "search=quick", costly]
    assert "needs tracking.price_per_hour" in refusal(search, params=None)
    assert compose([*search, "tracking.price_per_hour=1"], params=None)
    monkeypatch.setenv("CNN_TUNING_PRICE_PER_HOUR", "0.42")
    assert compose(search, params=None).tracking.price_per_hour == 0


@pytest.mark.parametrize("bits", [16, 32])
def test_a_precision_is_written_as_anyone_writes_it(tmp_path, bits):
    params = tmp_path / "params.yaml"
    params.write_text(f"experiment: digits\ntrainer: {{precision: {bits}}}\n")
    assert compose(params=params).trainer.precision == str(bits)
    given = [compose(["experiment=digits", f"trainer.precision={text}"]) for text in (bits, f"'{bits}'")]
    assert given[0] == given[1]
    assert lock_text(given[0]) == lock_text(given[1])
