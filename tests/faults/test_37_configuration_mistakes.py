"""Row 37: all mistakes of a configuration are told together, each with its place and the nearest valid name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from composing import in_project, refusal  # noqa: F401

from cnn_tuning.config import RegistryConfig, compose, patch
from cnn_tuning.errors import UserError

ROOT = Path(__file__).parents[2]


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


def test_37_mistakes_of_all_layers_are_told_together(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text(
        "experiment: digits\nmodle: lab_cnn\noptimizer: lion\n"
        "trainer: {max_epochs: 0, finetune: {trainable: head}}\n"
        "ablation:\n  questions:\n    mine: {question: q, factors: {trainer.batch_sise: [8, 16]}}\n"
        "    other: {question: q, factors: {optimizer.momentum: [0.5, 0.9]}}\n"
        "search: {space: {model.dropuot: {kind: categorical, choices: [none, both]}}, storage: 'mysql://x'}\n"
    )
    told = refusal(["trainer=[", "seed=-1", "~seed"], params=params)
    for line in (
        "'trainer=[' is not an override",
        "'~seed': only key=value",
        "params.yaml:2: modle: unknown name; did you mean 'model'?",
        "params.yaml:3: optimizer: no option 'lion'",
        "params.yaml:4: trainer.max_epochs: got 0",
        "override 'seed=-1': seed: got -1",
        "trainer.finetune: only for model.architecture backbone",
        "ablation.questions.mine.factors: trainer.batch_sise: unknown name; did you mean 'batch_size'?",
        "search.space.model.dropuot: value: model.dropuot: unknown name; did you mean 'dropout'?",
        "search.storage: got 'mysql://x'",
    ):
        assert line in told
    # Which names the optimizer has is known when it is.
    assert told.startswith("configuration has 10 mistakes:")


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
        ("model.architecture=lab_cn", "did you mean 'lab_cnn'?"),
        ("trainer.precision=17", "must be 'auto', '32', 'bf16' or '16'"),
        ("tracking.uri=ftp://x", "must be sqlite:///mlflow.db, http://HOST:PORT, postgresql://…"),
        ("tracking.experiment=''", "tracking.experiment: got '', must have at least 1 character"),
        ("data.sources=[]", "data.sources: got [], must be one or more"),
        ("data.sources=[{uri:'gopher://x'}]", "1 mistake:\n  override"),
        ("data.sources=[{uri:'gopher://x'}]", "got 'gopher://x', must be s3://bucket/prefix/, https://host/path/"),
        ("data.sources=[{uri:'wheel:name'}]", "wheel:name==version"),
        ("model=resnet50 model.weights.sources=[{uri:'hub:owner'}]", "or hub:owner/name"),
        ("data.classes=[a,b,a]", "must be all different: 'a' is not"),
        ("registry.model=a/b", "registry.model: got 'a/b', must be a name without / : and '"),
        ("registry.alias=Latest", "registry.alias: got 'Latest', must be letters, digits"),
        ("registry.alias=v1", "neither latest nor v1, v2 and so on"),
    ],
)
def test_37_each_kind_of_mistake(override, said):
    assert said in refusal(override.split())


def test_37_a_stage_tells_it_before_it_asks_for_data(tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "params.yaml").write_text("experiment: digits\n")
    command = [sys.executable, "-m", "cnn_tuning.stages.train", "trainer.max_epoch=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: configuration has 1 mistake:")
    assert "trainer.max_epoch: unknown name; did you mean 'max_epochs'?" in done.stderr
    assert "data/prepared" not in done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"conf", "params.yaml"}


def test_37_broken_yaml_names_the_line(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("experiment: digits\ntrainer: {max_epochs: 3\nseed: 1\n")
    assert "params.yaml:" in refusal(params=params)
    params.write_text("- a list\n")
    assert "expected `key: value` lines" in refusal(params=params)
    assert "is missing" in refusal(params=tmp_path / "none.yaml")


@pytest.mark.parametrize("model", ["a/b", "a:b", "..x", ".", " ", "mnist-classifier", "a b", "...", "v1"])
def test_37_a_registered_name_is_what_mlflow_takes(model):
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    taken = RegistryConfig(name="x", model="m", alias="champion")
    checks = [("model", [validation._validate_model_name])]
    checks += [("alias", [validation._validate_model_alias_name, validation._validate_model_alias_name_reserved])]
    for field, refusing in checks:
        try:
            for check in refusing:
                check(model)
        except MlflowException:
            with pytest.raises(UserError, match=rf"registry.{field}: got"):
                compose([f"registry.{field}={model!r}"], params=None)
        else:
            assert patch(taken, {field: model}) != taken
