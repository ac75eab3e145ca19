"""Logs and tunnels: what a host said, and its ports here, through stand-ins for AWS's client and its plugin."""

from __future__ import annotations

import base64
import os
import signal
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from played_host import RUN
from project import free_port
from renting import ACCOUNT

from cnn_tuning.cloud import session
from cnn_tuning.cloud.policies import of_person
from cnn_tuning.errors import UserError
from cnn_tuning.stages import host_session

# Answers on the local port, starts a plugin that outlives it, and notes both.
AWS = """
import json, os, socketserver, subprocess, sys
if os.environ.get("REFUSES"):
    sys.exit("An error occurred (TargetNotConnected) when calling StartSession: i-1 of account {account}")
plugin = subprocess.Popen(["session-manager-plugin"])
open(os.environ["NOTES"], "a").write(f"{{os.getpid()}} {{plugin.pid}} {{json.dumps(sys.argv[1:])}}\\n")
port = int(json.loads(sys.argv[sys.argv.index("--parameters") + 1])["localPortNumber"][0])
socketserver.TCPServer(("127.0.0.1", port), socketserver.BaseRequestHandler).serve_forever()
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """AWS's client and its plugin on the PATH; the file in which they note what they did."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in (
        ("aws", AWS.format(account=ACCOUNT)),
        ("session-manager-plugin", "import time; time.sleep(99)"),
    ):
        file = place / name
        file.write_text(f"#!{sys.executable} -S\n{text}")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    return tmp_path / "notes"


@pytest.fixture
def rented(aws, project, command, played):
    """A host of run `run-one`."""
    done = command("host", "run", "--yes", "--detach", "--run", RUN)
    assert done.exit_code == 0, done.output
    return played


def alive(pid):
    with suppress(FileNotFoundError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def test_a_tunnel_leads_to_each_port_and_leaves_no_process(rented, tools, project, command, monkeypatch):
    rented.put("jupyter.token", "s3cr3t-token\n")
    mlflow, jupyter = free_port(), free_port()

    def use(seconds):
        for port in (mlflow, jupyter):
            with socket.create_connection(("127.0.0.1", port)):
                pass
        raise KeyboardInterrupt

    monkeypatch.setattr(host_session, "hold", use)
    done = command("host", "tunnel", RUN, "--port", f"{mlflow}:5000", "--port", f"{jupyter}:8888")
    assert done.exit_code == 0, done.output
    assert "the host goes on" in done.output and "s3cr3t" not in done.output
    page = project / ".state/hosts" / RUN / "jupyter.html"
    target = f"http://127.0.0.1:{jupyter}/lab/tree/notebooks/cnn_tuning.ipynb?token=s3cr3t-token"
    assert f'url={target}"' in page.read_text() and stat.S_IMODE(page.stat().st_mode) == 0o600
    notes = [line.split(maxsplit=2) for line in tools.read_text().splitlines()]
    assert len(notes) == 2
    for child, plugin, arguments in notes:
        assert rented.instance["InstanceId"] in arguments and session.DOCUMENT in arguments
        assert not alive(child) and not alive(plugin)


def test_a_tunnel_that_the_host_refuses_is_one_line(rented, tools, command, monkeypatch):
    monkeypatch.setenv("REFUSES", "1")
    done = command("host", "tunnel", RUN, "--port", f"{free_port()}:5000")
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("error: tunnel to port 5000: the host has not reported")
    assert ACCOUNT not in done.output


def test_a_tunnel_that_is_cut_off_is_told(rented, tools, command, monkeypatch):
    def cut(_):
        os.kill(int(tools.read_text().split()[0]), signal.SIGKILL)
        monkeypatch.undo()

    monkeypatch.setattr(host_session, "hold", cut)
    done = command("host", "tunnel", RUN, "--port", f"{free_port()}:5000")
    assert done.exit_code == 1 and "closed from the other side" in done.output


def test_what_a_tunnel_needs_is_told(rented, command, monkeypatch, tmp_path, tools):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("host", "tunnel", RUN, "--port", str(port))
        assert done.exit_code == 1 and f"port {port} is in use here" in done.output
    assert "no host of run other runs" in command("host", "tunnel", "other").output
    by_ssh = command("host", "tunnel", RUN, "--ssh", "--port", "9999:8888")
    assert by_ssh.exit_code == 0
    assert "ssh -N -L 9999:127.0.0.1:8888 ubuntu@" in by_ssh.output
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command("host", "tunnel", RUN)
    assert done.exit_code == 1
    assert "the AWS CLI: https://" in done.output and "Session Manager plugin: https://" in done.output


def test_a_tunnel_to_pages_that_nobody_serves_is_not_opened(rented, tools, command):
    done = command("host", "tunnel", RUN)
    assert done.exit_code == 1 and not tools.exists()
    assert f"run {RUN} is a pipeline and serves no pages" in done.output


def test_a_desk_that_is_not_ready_says_so(aws, project, command, played, tools, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(host_session, "hold", stop)
    monkeypatch.setattr(host_session, "MLFLOW", free_port())
    monkeypatch.setattr(host_session, "JUPYTER", free_port())
    assert command("host", "up", "--yes", "--run", RUN, "--max-hours", "1").exit_code == 0
    played.put("state.json", '{"stage": "install"}')
    assert "not ready yet (stage install)" in command("host", "tunnel", RUN).output
    played.put("state.json", '{"stage": "ready"}')
    done = command("host", "tunnel", RUN)
    assert done.exit_code == 0 and "not ready" not in done.output


@pytest.mark.parametrize("text", ["", "x", "0", "70000", "1:", "1:2:3", "-1"])
def test_a_port_that_is_none_is_told(text):
    with pytest.raises(UserError, match="must be like 8888"):
        session.parse_port(text)


def test_logs_are_printed_and_followed_without_an_account(rented, command):
    assert "no log yet" in command("host", "logs", RUN).output
    rented.put("boot.log", f"1 arn:aws:iam::{ACCOUNT}:role/x\n")
    assert command("host", "logs", RUN).output == "1 arn:aws:iam::***:role/x\n"
    rented.plays(
        lambda: rented.put("boot.log", f"1 arn:aws:iam::{ACCOUNT}:role/x\n2\n"),
        rented.at_once(lambda: rented.put("boot.log", "anew\n"), rented.tells("finished")),
    )
    assert command("host", "logs", RUN, "-f").output == "1 arn:aws:iam::***:role/x\n2\nanew\n"
    assert "nothing of it is in s3://" in command("host", "logs", "other").output


def test_a_host_for_work_by_hand_runs_no_pipeline(aws, project, command, played):
    done = command("host", "up", "--yes", "--run", RUN, "--max-hours", "1")
    assert done.exit_code == 0, done.output
    assert f"cnn-tuning host tunnel {RUN}" in done.output
    script = aws.client("ec2").describe_instance_attribute(
        InstanceId=played.instance["InstanceId"], Attribute="userData"
    )["UserData"]["Value"]
    assert "MODE=interactive\n" in base64.b64decode(script).decode()
    assert command("host", "status").exit_code == 0
    assert command("host", "down", RUN).exit_code == 0


def test_who_may_open_a_tunnel_reaches_hosts_of_the_project_and_own_sessions_only():
    statements = {item["Sid"]: item for item in of_person("mine", "a-bucket", "x")["Statement"]}
    assert statements["Tunnel"]["Condition"]["StringEquals"] == {"ssm:resourceTag/project": "mine"}
    assert statements["TunnelHow"]["Resource"].endswith(f":document/{session.DOCUMENT}")
    assert statements["OwnTunnel"]["Resource"][0] == "arn:aws:ssm:*:*:session/${aws:userid}-*"
