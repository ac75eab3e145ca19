"""A tunnel to a host through Session Manager: no SSH key, no open port. Ports in, child processes out.

AWS's own client does it: `aws ssm start-session` with the session-manager-plugin, one child for each port.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from cnn_tuning.cloud.aws import hide_account
from cnn_tuning.errors import UserError

DOCUMENT = "AWS-StartPortForwardingSession"
OPENS_WITHIN_S = 60.0
_NEEDED = {
    "aws": "the AWS CLI: https://docs.aws.amazon.com/cli/latest/userguide/getting-started-install.html",
    "session-manager-plugin": "the Session Manager plugin: https://docs.aws.amazon.com/systems-manager/latest/"
    "userguide/session-manager-working-with-install-plugin.html",
}


@dataclass(frozen=True)
class Port:
    """A port here and the one on the host that it leads to."""

    local: int
    remote: int


def parse_port(text: str) -> Port:
    """Return `PORT` or `LOCAL:PORT` as a pair."""
    found = re.fullmatch(r"(?:(\d{1,5}):)?(\d{1,5})", text)
    port = Port(int(found[1] or found[2]), int(found[2])) if found else Port(0, 0)
    if not (0 < port.local < 65536 and 0 < port.remote < 65536):
        raise UserError(f"--port {text}: must be like 8888, or 9999:8888 (here:there)")
    return port


def check_tools() -> None:
    """Say what is not installed, and where it is to be had."""
    missing = [how for name, how in _NEEDED.items() if shutil.which(name) is None]
    if missing:
        raise UserError(f"a tunnel needs {'; and '.join(missing)}; or --ssh")


@contextlib.contextmanager
def tunnels(instance: str, region: str, ports: Sequence[Port]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Hold tunnels open; a child for each, ended at the end with what it started itself.

    Raises:
        UserError: a port is taken here, or a tunnel did not open, with AWS's reason.
    """
    check_tools()
    for port in ports:
        if _answers(port.local):
            raise UserError(
                f"port {port.local} is in use here: --port {port.local + 1}:{port.remote}, for example"
            )
    with contextlib.ExitStack() as stack:
        children = []
        for port in ports:
            told = stack.enter_context(tempfile.TemporaryFile())
            child = _start(instance, region, port, told)
            stack.callback(_end, child)
            children.append((child, port, told))
        for child, port, told in children:
            _wait(child, port, told)
        yield [child for child, _, _ in children]


def _start(instance: str, region: str, port: Port, told: IO[bytes]) -> subprocess.Popen[bytes]:
    parameters = {"portNumber": [str(port.remote)], "localPortNumber": [str(port.local)]}
    command = ["aws", "ssm", "start-session", "--region", region, "--target", instance]
    command += ["--document-name", DOCUMENT, "--parameters", json.dumps(parameters)]
    # A group of its own: the terminal's Ctrl-C is for this process, which ends the child and its plugin.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=told, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait(child: subprocess.Popen[bytes], port: Port, told: IO[bytes]) -> None:
    deadline = time.monotonic() + OPENS_WITHIN_S
    while not _answers(port.local):
        if child.poll() is not None or time.monotonic() > deadline:
            told.seek(0)
            lines = told.read().decode(errors="replace").strip().splitlines()
            reason = hide_account(lines[-1]) if lines else "no reason given"
            if "TargetNotConnected" in reason:
                reason = "the host has not reported to Session Manager yet: try again in a minute"
            raise UserError(f"tunnel to port {port.remote}: {reason}")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and what it started, which may outlive it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)


def ssh_commands(instance: str, region: str, address: str, group: str, ports: Sequence[Port]) -> list[str]:
    """Return what plain SSH takes: a way in for this address, a key for a minute, and the tunnel."""
    forward = " ".join(f"-L {port.local}:127.0.0.1:{port.remote}" for port in ports)
    return [
        f"aws ec2 authorize-security-group-ingress --region {region} --group-id {group} --protocol tcp --port 22 "
        '--cidr "$(curl -s https://checkip.amazonaws.com)/32"',
        f"aws ec2-instance-connect send-ssh-public-key --region {region} --instance-id {instance} "
        "--instance-os-user ubuntu --ssh-public-key file://~/.ssh/id_ed25519.pub",
        f"ssh -N {forward} ubuntu@{address}",
    ]
