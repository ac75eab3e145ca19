"""Row 18: where there is no spot notice, or no metadata service, training is as it is without."""

from __future__ import annotations

import socket
import time

import httpx
import pytest
from agents import Agent
from imds import imds, silent  # noqa: F401
from seaweed import _weed, seaweed  # noqa: F401


@pytest.fixture
def agent(tmp_path, seaweed):  # noqa: F811
    return lambda url: Agent(tmp_path, seaweed, url)


def trained(agent):
    process = agent.work(seconds=1.5)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert (agent.project / ".state/train/result").read_text() == "trained"
    assert not (agent.project / ".state/train/saved").exists()  # nobody asked it to stop
    assert "Traceback" not in printed
    assert not (agent.folder / "told.json").exists()
    return True


def test_18_no_notice(agent, imds):  # noqa: F811
    assert trained(agent(imds.url))
    assert imds.was_asked_for_notice()


def test_18_the_service_refuses(agent):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
        assert trained(agent(url))


def test_18_the_service_hangs(agent, silent):  # noqa: F811
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(silent.url, timeout=0.2)
    began = time.monotonic()
    assert trained(agent(silent.url))
    assert time.monotonic() - began < 60
    assert len(silent.connections) >= 2  # the agent asked, too


@pytest.mark.parametrize(
    "text", ["", "<html>", "[]", '{"action": "terminate"}', '{"action": 1, "time": 2}', "null"]
)
def test_18_an_answer_that_is_no_notice(agent, imds, monkeypatch, text):  # noqa: F811
    from cnn_tuning.cloud.metadata import Metadata

    says = imds.says
    monkeypatch.setattr(imds, "says", lambda path: (200, text) if path.endswith("action") else says(path))
    assert Metadata(imds.url).notice() is None
    assert imds.was_asked_for_notice()
