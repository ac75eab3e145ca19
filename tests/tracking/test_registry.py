"""Registration through the spool, the gate's decision on the version, and the lineage read back."""

import shutil
from threading import Timer

import pytest

from cnn_tuning.errors import UserError
from cnn_tuning.tracking import registry
from cnn_tuning.tracking.gate import Gate, write_predictions
from cnn_tuning.tracking.lineage import describe, lineage
from cnn_tuning.tracking.run import Run


def _evaluate(config, model, tmp_path, wrong, split="split-1", barred="", name="classifier"):
    predictions = tmp_path / "own-name.csv"
    write_predictions(predictions, split, ((i, i % 10, (i + (i < wrong)) % 10, 0.9) for i in range(500)))
    with Run.start(config, name="evaluate", kind="evaluate", params={"model.name": "m", "seed": 3}) as run:
        run.log_metrics({"test/accuracy": 1 - wrong / 500, "val/accuracy": 0.1})
        run.log_dataset(name="digits", digest=split, source="file:digits", split="test")
        run.register(
            model,
            name=name,
            alias="champion",
            predictions=predictions,
            gate=Gate(0.05, 0.0, barred),
            description="A classifier.",
            tags={"dvc.data": "0f.dir"},
        )
    return run.delivery


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def config(request, tracking):
    if request.param == "sqlite":
        return tracking()
    return tracking(uri=request.getfixturevalue("mlflow_server").uri)


def test_the_better_one_becomes_champion(config, tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"is not registered|no tracking store"):
        lineage("models:/classifier@champion", config)
    first, same, better, other = (
        _evaluate(config, tiny_model, tmp_path, wrong, split).registered
        for wrong, split in ((30, "split-1"), (30, "split-1"), (10, "split-1"), (0, "split-2"))
    )
    assert [r["promoted"] for r in (first, same, better, other)] == [True, False, True, False]
    assert "first champion" in first["reason"]
    assert "no gain" in same["reason"]
    assert "98.00% against 94.00% of version 1" in better["reason"]
    assert "another test split" in other["reason"]

    found = lineage("models:/classifier@champion", config)
    assert (found.version, found.aliases, found.gate) == ("3", ("champion",), better["reason"])
    assert found.configuration == {"model.name": "m", "seed": 3}
    assert found.metrics == {"test/accuracy": pytest.approx(0.98)}
    assert found.data == (("test", "digits", "split-1", "file:digits"),)
    assert found.tags["dvc.data"] == "0f.dir"
    page = describe(found)
    assert page.startswith("models:/classifier/3 @champion\n")
    for part in (found.run_id, found.commit, "split-1", "test/accuracy", "0.98", "model.name"):
        assert part in page
    with pytest.raises(UserError, match=r"models:/classifier@champion"):
        lineage("models:/classifier@challenger", config)
    with pytest.raises(UserError, match=r"models:/NAME@ALIAS"):
        lineage("classifier", config)


def test_a_barred_model_never_becomes_champion(tracking, tiny_model, tmp_path):
    config = tracking()
    barred = _evaluate(config, tiny_model, tmp_path, 0, barred="a budget of one epoch").registered
    assert not barred["promoted"]
    assert barred["reason"].startswith("not promoted: a budget of one epoch (100.00% on 500 test images)")
    with pytest.raises(UserError, match="models:/classifier@champion"):
        lineage("models:/classifier@champion", config)
    assert _evaluate(config, tiny_model, tmp_path, 30).registered["promoted"]


def test_of_a_snapshot_the_commit_that_it_was_made_of_is_shown(tracking, tiny_model, tmp_path, monkeypatch):
    here, snapshot = "a" * 40, "c" * 40
    code = {"git.commit": snapshot, "git.dirty": "false", "git.snapshot_of": here}
    monkeypatch.setattr("cnn_tuning.tracking.run._facts", lambda: code)
    config = tracking()
    _evaluate(config, tiny_model, tmp_path, 30)
    page = describe(lineage("models:/classifier@champion", config))
    assert f"  commit     {here} + uncommitted changes\n" in page
    assert snapshot not in page


def test_a_name_that_the_store_refuses_is_said_with_the_reason(tracking, tiny_model, tmp_path, capfd):
    delivery = _evaluate(tracking(), tiny_model, tmp_path, 30, name="a/b")
    assert delivery.state == "delivered"
    assert delivery.registered["refused"] is True
    assert not delivery.registered["promoted"]
    assert "version" not in delivery.registered
    reason = delivery.registered["reason"]
    assert reason.startswith("not registered: ")
    assert "a/b" in reason
    assert reason.removeprefix("not registered: ") in capfd.readouterr().err


@pytest.fixture
def uri(tracking):
    """Return a store that MLflow takes for its own: it looks models up there, whatever client asks."""
    import mlflow

    uri, previous = tracking().uri, mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(previous)


def test_of_two_hosts_that_promote_at_once_the_better_one_stays(uri, tiny_model, tmp_path):
    """The worse one's request comes after the better one has seen itself as champion."""
    from mlflow import MlflowClient

    late = []

    class Overtaken(MlflowClient):
        def set_registered_model_alias(self, name, alias, version):
            super().set_registered_model_alias(name, alias, version)
            if not late:
                worse = super().search_model_versions("name = 'classifier'")[-1].version
                late.append(Timer(0.3, lambda: MlflowClient(uri).set_registered_model_alias(name, alias, worse)))
                late[0].start()

    client = MlflowClient(uri)
    run = {}
    for name, wrong in (("worse", 30), ("better", 10)):
        run[name] = client.create_run("0").info.run_id
        write_predictions(
            tmp_path / f"{name}.csv", "s", ((i, i % 10, (i + (i < wrong)) % 10, 0.9) for i in range(500))
        )
        (tmp_path / name / "registry").mkdir(parents=True)
        shutil.copy(tmp_path / f"{name}.csv", tmp_path / name / "registry/predictions.csv")

    def event(name):
        return {
            **{"id": name, "name": "classifier", "alias": "champion", "description": "", "tags": {}},
            **{"model": tiny_model, "predictions": f"{name}/registry/predictions.csv"},
            "gate": {"significance": 0.05, "minimum_gain": 0.0},
        }

    # Not yet through its gate: the version and its predictions are there.
    client.create_registered_model("classifier")
    client.log_artifact(run["worse"], str(tmp_path / "worse/registry/predictions.csv"), "registry")
    worse = client.create_model_version("classifier", str(tiny_model), run_id=run["worse"]).version
    server = "http://another.name.of.this.store"
    found = registry.register(Overtaken(uri), server, run["better"], event("better"), tmp_path)
    late[0].join()
    assert found["promoted"]
    assert f"of version {worse}" in found["reason"]
    assert str(client.get_model_version_by_alias("classifier", "champion").version) == found["version"]


def test_a_folder_without_a_model_is_refused_at_once(tracking, tmp_path):
    run = Run.start(tracking(), name="n", kind="evaluate", params={})
    with pytest.raises(UserError, match="MLmodel"):
        run.register(
            tmp_path, name="c", alias="champion", predictions=tmp_path, gate=Gate(0.05, 0.0), description=""
        )
    run.finish("FAILED")
