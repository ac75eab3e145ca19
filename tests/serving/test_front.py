"""The HTTP front: what it answers, alone and under many clients; how it starts, stops and says no."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import live as servers
import numpy as np
import psutil
import pytest

from cnn_tuning.config import ServingConfig
from cnn_tuning.serving.predictor import Predictor


def test_health_and_usage(live: servers.Live) -> None:
    health = live.ask("/health")
    assert health.status == 200
    assert health.json == {"status": "ok", "name": "bundle", "version": "local"}
    usage = live.ask("/")
    assert usage.status == 200 and "POST /predict?top_k=3" in usage.text


def test_listens_on_loopback_only(live: servers.Live) -> None:
    processes = [psutil.Process(live.process.pid), *psutil.Process(live.process.pid).children(recursive=True)]
    listening = {
        connection.laddr
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == {live.port}


def test_top_k_in_the_query(live: servers.Live, digits: np.ndarray) -> None:
    reply = live.ask("/predict?top_k=3", servers.png(digits[0, 0]), "image/png")
    (answer,) = reply.json["predictions"]
    assert answer["top_k"][0]["label"] == answer["label"]
    assert len(answer["top_k"]) == 3


def test_any_image_type_and_octet_stream(live: servers.Live, digits: np.ndarray) -> None:
    picture = servers.png(digits[0, 0])
    for kind in ("image/png", "IMAGE/PNG; q=1", "image/x-whatever", "application/octet-stream"):
        assert live.ask("/predict", picture, kind).status == 200


def test_many_clients_get_their_own_answers(live: servers.Live, bundle: Path, digits: np.ndarray) -> None:
    """Their images share passes through the network; each answer is still that of the image alone."""
    predictor = Predictor(bundle)
    pictures = [servers.png(image[0]) for image in digits]
    alone = [predictor.predict([picture], top_k=10)[0] for picture in pictures]

    def ask(number: int) -> None:
        which = number % len(pictures)
        reply = live.ask("/predict?top_k=10", pictures[which], "image/png")
        (answer,) = reply.json["predictions"]
        assert answer["label"] == alone[which].label
        got = {choice["index"]: choice["probability"] for choice in answer["top_k"]}
        wanted = {choice.index: choice.probability for choice in alone[which].top_k}
        assert got == pytest.approx(wanted, abs=1e-6)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(200)))


def test_connection_is_kept_open(live: servers.Live, digits: np.ndarray) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
    sockets = set()
    for image in digits:
        connection.request("POST", "/predict", servers.png(image[0]), {"Content-Type": "image/png"})
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read()
        sockets.add(connection.sock)
    assert len(sockets) == 1
    connection.close()


class SlowPredictor(Predictor):
    """Does not answer before it is told to."""

    go = threading.Event()

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        self.go.wait(20)
        return super().probabilities(images)


def test_overload_is_503_with_retry_after(
    bundle: Path, digits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.testclient import TestClient

    from cnn_tuning.serving import front

    monkeypatch.setattr(front, "WAITING", 2)
    monkeypatch.setattr(front, "TOGETHER", 1)
    predictor = SlowPredictor(bundle)
    config = ServingConfig(name="test", allowed_hosts=("*",))
    picture = servers.png(digits[0, 0])
    with TestClient(front.application(predictor, config, "slow", "1")) as client, ThreadPoolExecutor(8) as pool:

        def ask() -> tuple[int, str | None, str]:
            reply = client.post("/predict", content=picture, headers={"Content-Type": "image/png"})
            return reply.status_code, reply.headers.get("retry-after"), reply.text

        asked = [pool.submit(ask) for _ in range(8)]
        deadline = time.monotonic() + 10
        while sum(future.done() for future in asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        early = [future.result() for future in asked if future.done()]
        predictor.go.set()
        replies = [future.result() for future in asked]
    assert len(early) == 5, "one computes, two wait, five are sent away"
    for status, retry_after, text in early:
        assert (status, retry_after) == (503, "1")
        servers.assert_one_line(text)
    assert sorted(status for status, _, _ in replies) == [200] * 3 + [503] * 5


class BrokenPredictor(Predictor):
    """Fails as a programming error would."""

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        raise RuntimeError("secret of /etc/passwd")


def test_an_unforeseen_error_gives_nothing_away(bundle: Path, digits: np.ndarray) -> None:
    from starlette.testclient import TestClient

    from cnn_tuning.serving import front

    config = ServingConfig(name="test", allowed_hosts=("*",))
    with TestClient(
        front.application(BrokenPredictor(bundle), config, "broken", "1"), raise_server_exceptions=False
    ) as client:
        for _ in range(2):
            reply = client.post(
                "/predict", content=servers.png(digits[0, 0]), headers={"Content-Type": "image/png"}
            )
            assert reply.status_code == 500
            servers.assert_one_line(reply.text)
            assert "secret" not in reply.text


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stop_finishes_what_is_under_way(bundle: Path, how: signal.Signals) -> None:
    """A request whose body is still coming when the signal arrives gets its answer."""
    import socket

    picture = servers.png(np.zeros((28, 28), np.uint8))
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    head += f"Content-Length: {len(picture)}\r\nExpect: 100-continue\r\n\r\n"
    with (
        servers.front(bundle) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 100"), "the body is being waited for"
        connection.sendall(picture[:20])
        workers = psutil.Process(server.process.pid).children(recursive=True)
        if how == signal.SIGINT:
            os.killpg(server.process.pid, how)  # as Ctrl-C in a terminal: all processes get it
        else:
            os.kill(server.process.pid, how)
        time.sleep(0.3)
        connection.sendall(picture[20:])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.close()
        assert server.process.wait(20) == 0
        assert not psutil.wait_procs(workers, timeout=10)[1]


def test_killed_server_leaves_no_worker(bundle: Path) -> None:
    with servers.front(bundle) as server:
        workers = psutil.Process(server.process.pid).children(recursive=True)
        assert workers
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=15)
        assert not alive


def _launch(model: str, **limits: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", servers.LAUNCH, model, json.dumps(limits)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_taken_port_is_one_line(live: servers.Live, bundle: Path) -> None:
    done = _launch(str(bundle), port=live.port)
    assert done.returncode == 1
    assert f"127.0.0.1:{live.port}" in done.stderr and "serving.port" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_such_model_is_one_line(tmp_path: Path) -> None:
    done = _launch(str(tmp_path / "nothing"), port=0)
    assert done.returncode == 1 and "no such folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_damaged_weights_are_not_served(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    done = _launch(str(copy), port=servers.free_port())
    assert done.returncode == 1
    assert "SHA-256 differs" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text", ["", "flavors: [", "flavors: 3", "\x00", "flavors: {python_function: {artifacts: 1}}"]
)
def test_a_damaged_mlflow_model_is_one_line(tmp_path: Path, text: str) -> None:
    from cnn_tuning.errors import UserError
    from cnn_tuning.serving.server import find

    (tmp_path / "MLmodel").write_text(text)
    with pytest.raises(UserError, match="MLmodel: damaged") as caught:
        find(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_find_knows_every_way_to_name_a_model(
    bundle: Path, mlflow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from cnn_tuning.errors import UserError
    from cnn_tuning.serving.server import find

    assert find(str(bundle)).bundle == bundle
    assert find(str(mlflow_model)).bundle == mlflow_model / "artifacts" / "bundle"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="no such file"):
        find("models:/digits@champion")
    assert not list(tmp_path.iterdir()), "looking for a model makes no database"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    previous = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with mlflow.start_run() as run:
            mlflow.log_artifacts(str(mlflow_model), "model")
        mlflow.register_model(f"runs:/{run.info.run_id}/model", "digits")
        mlflow.MlflowClient().set_registered_model_alias("digits", "champion", "1")
        served = find("models:/digits@champion", uri)
        assert (served.name, served.version) == ("digits", "1")
        weights = (served.bundle / "weights.safetensors").read_bytes()
        assert weights == (bundle / "weights.safetensors").read_bytes()
        assert find("models:/digits/1").version == "1"
        for missing in ("models:/digits@none", "models:/other@champion", "models:/digits/9"):
            with pytest.raises(UserError) as caught:
                find(missing)
            assert missing in str(caught.value) and "\n" not in str(caught.value)
    finally:
        mlflow.set_tracking_uri(previous)
