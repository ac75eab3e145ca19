"""Row 1: the tracking server is down, or silent, when a run starts."""

import socket
import time

import pytest

from cnn_tuning.errors import UserError
from cnn_tuning.tracking.run import Run


@pytest.fixture(params=["closed", "silent"])
def dead_uri(request):
    """A port that refuses, and one that takes the connection and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        if request.param == "silent":
            listener.listen()
        with socket.socket() as probe:
            assert (probe.connect_ex(("127.0.0.1", port)) == 0) == (request.param == "silent")
        yield f"http://127.0.0.1:{port}"


def test_stops_with_the_uri_named(tracking, dead_uri, tmp_path):
    began = time.monotonic()
    with pytest.raises(UserError, match=dead_uri):
        Run.start(tracking(uri=dead_uri, on_unreachable="stop"), name="n", kind="train", params={})
    assert time.monotonic() - began < 10
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "mysql+pymysql"])
def test_stops_where_no_database_listens(tracking, tmp_path, scheme):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{closed.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(UserError, match=f"{place}/runs is not reachable .*refused") as told:
            Run.start(
                tracking(uri=f"{scheme}://me:hush-hush@{place}/runs", on_unreachable="stop"),
                name="n", kind="train", params={},
            )  # fmt: skip
    assert time.monotonic() - began < 10
    assert "hush-hush" not in str(told.value)
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "mysql+pymysql"])
def test_spools_where_no_database_listens(tracking, tmp_path, capfd, scheme):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{closed.getsockname()[1]}"
        config = tracking(uri=f"{scheme}://me:hush-hush@{place}/runs", wait_s=2.0)
        began = time.monotonic()
        run = Run.start(config, name="n", kind="train", params={"seed": 1})
        assert time.monotonic() - began < 10
        told = capfd.readouterr().err
        assert f"{place}/runs is not reachable" in told
        assert f"offline, spooling to {tmp_path / 'spool'}" in told
        run.log_metrics({"train/loss": 0.5})
        delivery = run.finish()
    assert delivery.state == "spooled"
    written = (tmp_path / "spool" / f"{run.key}.jsonl").read_text()
    assert '"train/loss":0.5' in written
    assert "hush-hush" not in written + told + delivery.message


def test_spools_and_says_so(tracking, dead_uri, tmp_path, capfd):
    began = time.monotonic()
    run = Run.start(tracking(uri=dead_uri, wait_s=2.0), name="n", kind="train", params={"seed": 1})
    assert time.monotonic() - began < 10
    told = capfd.readouterr().err
    assert dead_uri in told
    assert f"offline, spooling to {tmp_path / 'spool'}" in told
    run.log_metrics({"train/loss": 0.5})
    delivery = run.finish()
    assert delivery.state == "spooled"
    assert "cnn-tuning sync" in delivery.message
    assert '"train/loss":0.5' in (tmp_path / "spool" / f"{run.key}.jsonl").read_text()
