"""The boot script, really executed, with stand-ins for a host's commands: it always reports and shuts down."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from project import Project, free_port
from renting import host_config, order

from cnn_tuning.cloud.specification import LARGEST_USER_DATA, boot_script
from cnn_tuning.stages.host_session import NOTEBOOK

TOOLS = ("aws", "shutdown", "git", "make", "dvc", "apt-get", "snap", "unzip", "nvidia-smi", "python3", "python")
# Of the agent's commands `run -- COMMAND` has to do something.
AGENT = 'while [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done; [ $# -eq 0 ] || { shift; exec "$@"; }'


class Machine:
    """A folder with the commands of a host that note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls_file = folder / "root", folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.calls_file.touch()
        for tool in TOOLS:
            self.stand_in(tool, "exit 0")
        self.stand_in("git", f'[ "$1" != init ] || mkdir -p {self.root}/project')
        self.stand_in("python", AGENT)
        self.stand_in("curl", "exit 7")  # nobody answers
        # What is uploaded is kept under its last name.
        self.stand_in("aws", f'case "$4" in {self.root}/*) cp "$4" {folder}/up-"$(basename "$5")";; esac')

    def stand_in(self, tool: str, does: str) -> None:
        """Let a command do something else from now on."""
        path = self.bin / tool
        path.write_text(f'#!/bin/bash\necho "{tool} $*" >>{self.calls_file}\n{does}\n')
        path.chmod(0o755)

    def script(self, **settings: str) -> str:
        """Return the boot script of a host whose things are all below this folder."""
        text = boot_script(host_config(), order(attempt=2), 60, root=str(self.root))
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
    commands = ("make setup", "dvc --wait-for-lock repro", "dvc --wait-for-lock push")
    order_of = [calls.index(call) for call in commands]
    assert order_of == sorted(order_of)
    asked = [call for call in calls if call.startswith("python -m cnn_tuning.cloud.agent")]
    place = "--at s3://a-bucket/cnn-tuning/runs/run-one --region us-east-1 --attempt 2"
    assert all(place in call for call in asked)
    restore, pull, run, results = (calls.index(call) for call in asked)
    assert [calls[at].split()[-1] for at in (restore, pull, results)] == ["restore", "pull", "results"]
    assert order_of[0] < restore < pull < run < order_of[1] < order_of[2] < results
    assert calls[-1] == "shutdown -h now"
    assert json.loads(machine.uploaded("state.json")) | {"at": ""} == {
        "run": "run-one", "attempt": 2, "state": "finished", "exit": 0, "stage": "end", "at": "", "instance": None,
        "type": None,
    }  # fmt: skip


def test_the_agent_knows_when_the_host_ends(machine):
    before = time.time()
    assert machine.boot() == 0
    [run] = [call for call in machine.calls if " run --ends-at " in call]
    ends, began = (int(run.split(option)[1].split()[0]) for option in ("--ends-at ", "--began "))
    assert ends - began == 57 * 60
    assert before - 1 <= began <= time.time()


def test_what_the_agent_has_said_stays(machine):
    said = r"{\"state\": \"interrupted\"}"
    machine.stand_in("python", f'case "$*" in *" run "*) echo {said} >{machine.root}/told.json; exit 75;; esac')
    assert machine.boot() == 75
    assert machine.calls[-1] == "shutdown -h now"
    assert json.loads(machine.uploaded("state.json")) == {"state": "interrupted"}  # not "failed"
    assert "dvc --wait-for-lock push" not in machine.calls
    assert "host of run run-one" in machine.uploaded("boot.log")


def test_the_state_says_which_host_it_is(machine):
    says = {"api/token": "secret-token", "instance-id": "i-1", "instance-type": "g5.xlarge"}
    answers = " ".join(f'*/{path}) printf %s "{text}";;' for path, text in says.items())
    machine.stand_in("curl", f'case "${{@: -1}}" in {answers} *) exit 22;; esac')
    assert machine.boot() == 0
    state = json.loads(machine.uploaded("state.json"))
    assert (state["instance"], state["type"]) == ("i-1", "g5.xlarge")
    asked = [call for call in machine.calls if call.startswith("curl")]
    assert "-X PUT" in asked[0]
    assert all("X-aws-ec2-metadata-token: secret-token" in call for call in asked if "meta-data" in call)
    assert "secret-token" not in machine.uploaded("boot.log")


def test_an_interactive_host_runs_no_pipeline_and_keeps_its_token_to_itself(machine):
    machine.stand_in("python", f'case "$1 $2" in "-c import secrets"*) echo a-jupyter-token;; *) {AGENT};; esac')
    machine.stand_in("mlflow", "exit 0")
    machine.stand_in("jupyter", f'echo "$JUPYTER_TOKEN" >{machine.root}/used; pwd >{machine.root}/where; '
                     f'cp {machine.root}/state.json {machine.root}/then.json')  # fmt: skip
    assert machine.boot(MODE="interactive") == 0
    assert not [call for call in machine.calls if "repro" in call]
    assert machine.uploaded("jupyter.token") == "a-jupyter-token\n"
    assert (machine.root / "used").read_text() == "a-jupyter-token\n"
    assert (machine.root / "where").read_text() == f"{machine.root}/project\n"
    assert (machine.root / "jupyter.token").stat().st_mode & 0o077 == 0
    then = json.loads((machine.root / "then.json").read_text())
    assert (then["state"], then["stage"]) == ("started", "ready")
    assert "a-jupyter-token" not in machine.uploaded("boot.log")
    [jupyter] = [call for call in machine.calls if call.startswith("jupyter")]
    assert "--ip 127.0.0.1 --port 8888" in jupyter
    assert machine.calls[-1] == "shutdown -h now"


@pytest.mark.slow
def test_jupyter_as_a_host_starts_it_shows_the_notebook_to_who_has_the_token(tmp_path):
    [line] = re.findall("(JUPYTER_TOKEN=.*)' -", boot_script(host_config(), order(), 60))
    port, token = free_port(), tmp_path / "jupyter.token"
    there = line.replace("--port 8888", f"--port {port}")
    assert there != line
    token.write_text("a-jupyter-token\n")
    project = Project(tmp_path / "project", "experiment: digits\n")
    jupyter = project.start("bash", "-c", there, "-", str(token), HOME=str(tmp_path))
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            _wait_for_an_answer(client, jupyter)
            shown = client.get(f"/api/contents/{NOTEBOOK}", params={"token": "a-jupyter-token"})
            page = client.get(f"/lab/tree/{NOTEBOOK}", params={"token": "a-jupyter-token"})
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as stranger:  # who has no cookie
            refused = [stranger.get(f"/api/contents/{NOTEBOOK}", params=given) for given in ({}, {"token": "x"})]
            login = stranger.get(f"/lab/tree/{NOTEBOOK}")
    finally:
        jupyter.terminate()
        jupyter.communicate(timeout=60)
    assert shown.status_code == 200 and shown.json()["type"] == "notebook" and shown.json()["content"]["cells"]
    assert page.status_code == 200
    assert [answer.status_code for answer in refused] == [403, 403]
    assert login.status_code == 302 and "/login" in login.headers["location"]


def _wait_for_an_answer(client: httpx.Client, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.stdout and process.stdout.read()
        try:
            client.get("/api")
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return


def test_what_is_missing_is_installed_once_apt_is_free(machine):
    machine.stand_in("python3", "exit 1")  # too old
    # The system's own updates hold the lock of the lists for two tries.
    machine.stand_in("apt-get", f'[ "$3" != update ] || [ "$(grep -c "update -q" {machine.calls_file})" -gt 2 ]')
    machine.stand_in("sleep", '[ "$1" = 10 ] || exec /bin/sleep "$1"')
    assert machine.boot() == 0
    apt = "apt-get -o DPkg::Lock::Timeout=300"
    asked = [call for call in machine.calls if call.startswith("apt-get")]
    assert asked == [*[f"{apt} update -q"] * 3, f"{apt} install -qy python3-venv"]
    assert machine.calls.index("make setup") > machine.calls.index(asked[-1])


def test_it_fits_into_user_data(machine):
    assert len(machine.script().encode()) < 8 * 1024 < LARGEST_USER_DATA


@pytest.mark.parametrize(
    ("tool", "does", "stage"),
    [
        ("make", "exit 2", "install"),
        ("dvc", '[ "$2" != repro ]', "pipeline"),
        ("python", '[ "${*: -1}" != restore ]', "restore"),
        ("python", '[ "${*: -1}" != pull ]', "data"),
        ("dvc", '[ "$2" != push ]', "results"),
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
    assert json.loads(machine.uploaded("state.json"))["state"] == "idle"  # a replacement would be idle too


def test_an_idle_host_has_its_agent_save_before_it_shuts_down(machine):
    machine.stand_in("nvidia-smi", "echo 0")
    machine.stand_in("awk", "exit 1")
    saves = f"trap 'sleep 1; echo saved >>{machine.calls_file}; exit 1' TERM; sleep 60 & wait"
    machine.stand_in("python", f'case "$*" in *" run "*) {saves};; esac')
    booting = machine.start(LOOK_EVERY_S="0.5", IDLE_LOOKS="6")
    machine.wait_for("shutdown -h now")
    assert booting.wait(timeout=60) != 0
    assert "saved" in machine.calls
    assert machine.calls.index("saved") < machine.calls.index("shutdown -h now")
    assert json.loads(machine.uploaded("state.json"))["state"] == "idle"


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
