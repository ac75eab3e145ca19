"""The boot script, really executed, with stand-ins for a host's commands: it always reports and shuts down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from renting import host_config, order

from cnn_tuning.cloud.specification import boot_script

TOOLS = ("aws", "shutdown", "git", "make", "dvc", "apt-get", "snap", "unzip", "nvidia-smi", "python3")


class Machine:
    """A folder with the commands of a host that note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls_file = folder / "root", folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.calls_file.touch()
        for tool in TOOLS:
            self.stand_in(tool, "exit 0")
        self.stand_in("git", f'[ "$1" != init ] || mkdir -p {self.root}/project')
        # What is uploaded is kept under its last name.
        self.stand_in("aws", f'case "$4" in {self.root}/*) cp "$4" {folder}/up-"$(basename "$5")";; esac')

    def stand_in(self, tool: str, does: str) -> None:
        """Let a command do something else from now on."""
        path = self.bin / tool
        path.write_text(f'#!/bin/bash\necho "{tool} $*" >>{self.calls_file}\n{does}\n')
        path.chmod(0o755)

    def script(self, **settings: str) -> str:
        """Return the boot script of a host whose things are all below this folder."""
        text = boot_script(host_config(), order(), 60, root=str(self.root))
        for name, value in settings.items():
            line = next(line for line in text.splitlines() if line.startswith(f"{name}="))
            text = text.replace(line, f"{name}={value}", 1)
        return text

    def start(self, **settings: str) -> subprocess.Popen:
        """Boot."""
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.root)}
        (self.root.parent / "user-data").write_text(self.script(**settings))
        bash = shutil.which("bash")
        assert bash
        return subprocess.Popen(
            [bash, str(self.root.parent / "user-data")], env=environment, start_new_session=True
        )

    def boot(self, **settings: str) -> int:
        """Boot and wait for the end."""
        return self.start(**settings).wait(timeout=60)

    @property
    def calls(self) -> list[str]:
        """Return the commands that were called."""
        return self.calls_file.read_text().splitlines()

    def uploaded(self, name: str) -> str:
        """Return what was uploaded last under a name."""
        return (self.root.parent / f"up-{name}").read_text()

    def wait_for(self, call: str) -> None:
        """Wait until a command has been called."""
        deadline = time.monotonic() + 60
        while call not in self.calls:
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.05)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_a_host_that_is_done_has_pushed_reported_and_shuts_down(machine):
    assert machine.boot() == 0
    calls = machine.calls
    assert calls[0] == "shutdown -h +57"  # the lifetime is set before anything else can go wrong
    order_of = [calls.index(call) for call in ("make setup", "dvc pull --allow-missing", "dvc repro", "dvc push")]
    assert order_of == sorted(order_of)
    assert calls[-1] == "shutdown -h now"
    assert json.loads(machine.uploaded("state.json")) | {"at": ""} == {
        "run": "run-one", "state": "finished", "exit": 0, "stage": "end", "at": "",
    }  # fmt: skip
    assert any(call.endswith("s3://a-bucket/cnn-tuning/runs/run-one/dvc.lock") for call in calls)


@pytest.mark.parametrize(
    ("tool", "does", "stage"),
    [
        ("make", "exit 2", "install"),
        ("dvc", '[ "$1" != repro ]', "pipeline"),
        ("dvc", '[ "$1" != push ]', "results"),
        ("git", "exit 128", "code"),
    ],
)
def test_a_host_that_fails_reports_where_and_shuts_down(machine, tool, does, stage):
    machine.stand_in(tool, does)
    assert machine.boot() != 0
    assert machine.calls[-1] == "shutdown -h now"
    state = json.loads(machine.uploaded("state.json"))
    assert (state["state"], state["stage"]) == ("failed", stage)
    assert f"failed in {stage}" in machine.uploaded("boot.log")


def test_a_host_that_cannot_even_upload_shuts_down(machine):
    machine.stand_in("aws", "exit 1")
    assert machine.boot() != 0
    assert machine.calls[-1] == "shutdown -h now"


def test_a_host_whose_lifetime_cannot_be_set_does_not_go_on(machine):
    machine.stand_in("shutdown", '[ "$2" = now ]')
    assert machine.boot() != 0
    assert machine.calls[-1] == "shutdown -h now"
    assert "make setup" not in machine.calls


def test_a_host_that_is_told_to_stop_uploads_its_log(machine):
    machine.stand_in("make", "sleep 60")
    booting = machine.start()
    machine.wait_for("make setup")
    os.killpg(booting.pid, signal.SIGTERM)
    booting.wait(timeout=60)
    assert machine.calls[-1] == "shutdown -h now"
    assert json.loads(machine.uploaded("state.json"))["state"] == "failed"


def test_an_idle_host_shuts_down(machine):
    machine.stand_in("nvidia-smi", "echo 0")
    machine.stand_in("awk", "exit 1")  # the load is low
    machine.stand_in("make", "sleep 60")
    booting = machine.start(LOOK_EVERY_S="0.1", IDLE_LOOKS="3")
    machine.wait_for("shutdown -h now")
    assert json.loads(machine.uploaded("state.json"))["state"] == "idle"
    os.killpg(booting.pid, signal.SIGTERM)
    booting.wait(timeout=60)


def test_a_busy_host_is_not_idle(machine):
    machine.stand_in("nvidia-smi", "echo 93")
    machine.stand_in("awk", "exit 1")
    machine.stand_in("make", "sleep 1.5")
    assert machine.boot(LOOK_EVERY_S="0.1", IDLE_LOOKS="3") == 0
    assert machine.calls.count("nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits") > 3
    assert json.loads(machine.uploaded("state.json"))["state"] == "finished"


def test_settings_cannot_break_out_of_their_quotes(tmp_path):
    text = boot_script(host_config(prefix="a'; touch /tmp/x; '"), order(), 60)
    done = subprocess.run(
        ["bash", "-c", text[: text.index("# Runs once")] + 'printf %s "$PREFIX"'], capture_output=True, text=True
    )
    assert done.stdout == "a'; touch /tmp/x; '"
