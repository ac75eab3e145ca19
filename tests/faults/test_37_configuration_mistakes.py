"""Row 37: all mistakes of a configuration are told together, each with its place and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnn_tuning.config import compose
from cnn_tuning.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def refusal(overrides=(), **where) -> str:
    with pytest.raises(UserError) as caught:
        compose(overrides, **where)
    return str(caught.value)


def test_37_all_mistakes_are_told_together_with_line_and_nearest_name(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text(
        "experiment: digits\nseed: -1\nmodle: lab_cnn\nmodel: lab_cn\n"
        "trainer:\n  max_epoch: 3\n  batch_size: many\n  precision: b16\nschedule: {peak_at: 2}\n"
    )
    told = refusal(params=params)
    assert told.startswith("configuration has 7 mistakes:")
    for line in (
        "params.yaml:2: seed: got -1, must be greater than or equal to 0",
        "params.yaml:3: modle: unknown name; did you mean 'model'?",
        "params.yaml:4: model: no option 'lab_cn'; did you mean 'lab_cnn'?",
        "params.yaml:6: trainer.max_epoch: unknown name; did you mean 'max_epochs'?",
        "params.yaml:7: trainer.batch_size: got 'many', must be integer",
        "params.yaml:8: trainer.precision: got 'b16'",
        "did you mean 'bf16'?",
        "params.yaml:9: schedule.peak_at: got 2, must be less than 1",
    ):
        assert line in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer=lion", "one of adam, adamw, sgd"),
        ("schedule=cosine schedule.peak_at=0.2", "schedule.peak_at: unknown name"),
        ("experiment=mnits", "did you mean 'mnist'?"),
        ("model.dropout=conw", "did you mean 'conv'?"),
        ("model.arguments.stem=wide", "must be like 32"),
        ("data.image.size=[28]", "data.image.size"),
        ("trainer.max_epochs=0", "must be greater than or equal to 1"),
        ("trainer.max_epochs=1.5", "must be integer"),
        ("seed=true", "must be integer"),
        ("trainer=[", "is not an override"),
        ("trainer", "is not an override"),
        ("seed=1,2", "only key=value"),
        ("~seed", "only key=value"),
    ],
)
def test_37_each_kind_of_mistake(override, said):
    assert said in refusal(override.split())


def test_37_broken_yaml_names_the_line(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("experiment: digits\ntrainer: {max_epochs: 3\nseed: 1\n")
    assert "params.yaml:" in refusal(params=params)
    params.write_text("- a list\n")
    assert "expected `key: value` lines" in refusal(params=params)
    assert "is missing" in refusal(params=tmp_path / "none.yaml")
