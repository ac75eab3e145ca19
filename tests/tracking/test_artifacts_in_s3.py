"""Artifacts that an MLflow server keeps in S3: what S3 refuses or cannot take waits in the spool."""

from __future__ import annotations

import pytest
from mlflow_server import MlflowServer
from seaweed import BUCKET, SECRET, _weed, seaweed  # noqa: F401

from cnn_tuning.tracking.deliver import sync
from cnn_tuning.tracking.run import Run

CONTENT = b"what a run has made"


@pytest.fixture
def server(tmp_path, seaweed):  # noqa: F811
    server = MlflowServer(tmp_path / "server", f"s3://{BUCKET}/mlflow", **seaweed.environment)
    yield server
    server.kill()


def run_with_a_file(config, tmp_path):
    (tmp_path / "made.bin").write_bytes(CONTENT)
    run = Run.start(config, name="n", kind="train", params={})
    run.log_metrics({"val/loss": 1.0}, step=1)
    run.log_artifact(tmp_path / "made.bin", "made")
    run.log_metrics({"val/loss": 0.5}, step=2)
    return run, run.finish()


def losses(server, run_id):
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    return [metric.value for metric in client.get_metric_history(run_id, "val/loss")]


def arrived(seaweed):  # noqa: F811
    return [seaweed.read(key) for key in seaweed.keys("mlflow/")]


def test_a_file_arrives(tracking, tmp_path, server, seaweed):  # noqa: F811
    server.start()
    _, delivery = run_with_a_file(tracking(uri=server.uri), tmp_path)
    assert delivery.state == "delivered"
    assert arrived(seaweed) == [CONTENT]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["S3 is down", "wrong credentials"])
def test_nothing_is_lost_while_s3_takes_nothing(tracking, tmp_path, server, seaweed, case):  # noqa: F811
    if case == "wrong credentials":
        server.environment["AWS_SECRET_ACCESS_KEY"] = SECRET.swapcase()
    server.start()
    if case == "S3 is down":
        seaweed.kill()
    run, delivery = run_with_a_file(tracking(uri=server.uri, wait_s=3.0), tmp_path)
    assert delivery.state == "spooled"
    assert "cnn-tuning sync" in delivery.message and len(delivery.message.splitlines()) == 1
    [waiting] = sync(tmp_path / "spool")
    assert waiting.state != "delivered"
    for told in (delivery.message, waiting.message):
        assert SECRET not in told and SECRET.swapcase() not in told
    if case == "S3 is down":
        seaweed.start()
    else:
        assert arrived(seaweed) == []
        server.kill()
        server.environment["AWS_SECRET_ACCESS_KEY"] = SECRET
        server.start()
    while [row.state for row in sync(tmp_path / "spool")] != ["delivered"]:
        pass
    assert arrived(seaweed) == [CONTENT]
    assert losses(server, sync(tmp_path / "spool")[0].run_id) == [1.0, 0.5]
    assert run.key == waiting.key
