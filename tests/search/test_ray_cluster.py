"""Searches on a real Ray: one of this machine, and a simulated cluster, one of whose hosts is killed.

All of it runs in a network namespace of its own. A host is a name, an address, processes that see each other only
and die together; all see the same disk, as over NFS. Skipped where the kernel allows no namespaces.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import searching
from project import BIN, ROOT
from searching import Sweep, running, search_with, states, status, tags

from cnn_tuning.config import to_plain
from cnn_tuning.tracking.deliver import sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
hosts = {f"host-{letter}": f"10.9.0.{number}" for number, letter in enumerate("abcdefg", start=1)}
HEAD, LOST, BARE, SECOND, GPU, *OTHERS = hosts
SETUP = " && ".join(
    [
        "hostname host-a",
        "ip link set lo up",
        *(f"ip addr add {address}/32 dev lo" for address in hosts.values()),
        'mount --bind "$1" /etc/hosts',
        "touch $2",
        "exec sleep 3600",
    ]
)
# Ray gives its parts 30 s to start, which is little on a busy machine; those with ports of their own it does not
# wait for.
TRIES = 4
PORTS = ("metrics-export", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent")


class World:
    """A network in which nothing but these hosts is reached; `env` is what all processes of it are given."""

    def __init__(self, folder: Path) -> None:
        self.temporary = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # paths of sockets are to be short
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in hosts.items()))
        self.holder = subprocess.Popen(
            ["unshare", "-rnum", "sh", "-c", SETUP, "-", str(folder / "hosts"), str(folder / "ready")]
        )
        self.log = folder / "ray.log"
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE" and not k.startswith("RAY_")}
        self.env = {
            "PYTHONPYCACHEPREFIX": str(folder.parent / "pycache"),  # Ray's processes import much, and often
            **kept,
            "PYTHONPATH": f"{searching.TESTS}:{ROOT / 'src'}",
            "COLUMNS": "300",
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(self.temporary),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        _wait_for((folder / "ready").exists, self.holder)

    def start(self, *command: str, **keywords: Any) -> subprocess.Popen[str]:
        """Start a process in it, on the first host."""
        inside = [
            "nsenter",
            "-t",
            str(self.holder.pid),
            "-U",
            "--preserve-credentials",
            "-n",
            "-u",
            "-m",
            f"--wd={ROOT}",
        ]
        return subprocess.Popen(
            [*inside, *command],
            env=self.env,
            text=True,
            start_new_session=True,
            stderr=subprocess.STDOUT,
            **keywords,
        )

    def search(self, sweep: Sweep) -> subprocess.Popen[str]:
        """Start a search on the first host."""
        spec = {"folder": str(sweep.folder), "data": str(sweep.data), "search": to_plain(sweep.search),
                "overrides": sweep.overrides}  # fmt: skip
        return self.start(sys.executable, searching.__file__, json.dumps(spec), stdout=subprocess.PIPE)

    def host(self, name: str, cpus: int, *, gpus: int = 0, hides: Path | None = None) -> subprocess.Popen[str]:
        """Start Ray on a host; one other than the first has processes of its own, and dies as a whole."""
        own = ["start", f"--node-ip-address={hosts[name]}", f"--num-cpus={cpus}", "--object-store-memory=80000000"]
        own += [f"--num-gpus={gpus}"]
        first = 20000 + 100 * list(hosts).index(name)
        own += [f"--{port}-port={first + number}" for number, port in enumerate(PORTS)]
        if name == HEAD:
            command = [*RAY, *own, "--block", "--head", "--port=6379", "--include-dashboard=false"]
        else:
            hidden = f"mount -t tmpfs none {hides} && " if hides else ""
            apart = ["unshare", "-pum", "--fork", "--kill-child", "--mount-proc"]
            does = ["sh", "-c", f'{hidden}hostname {name} && exec "$@"', "-"]
            command = [*apart, *does, *RAY, *own, "--block", f"--address={hosts[HEAD]}:6379"]
        for left in reversed(range(TRIES)):
            with self.log.open("w") as log:
                process = self.start(*command, stdout=log)
            try:
                _wait_for(lambda: "Ray runtime started" in self.log.read_text(), process)
            except AssertionError:
                process.kill()
                if not left:
                    raise AssertionError(self.log.read_text()) from None
            else:
                return process
        raise AssertionError

    def processes(self) -> list[psutil.Process]:
        """Return what runs in it."""
        found, own = [], Path(f"/proc/{self.holder.pid}/ns/net").readlink()
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if process.pid != self.holder.pid and Path(f"/proc/{process.pid}/ns/net").readlink() == own:
                    found.append(process)
        return found

    def kill(self) -> None:
        """End all that runs in it."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def end(self) -> None:
        """End everything."""
        self.kill()
        self.holder.kill()
        self.holder.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


def _wait_for(condition: Any, process: subprocess.Popen, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    """A network without any Ray."""
    if subprocess.run(["unshare", "-rnum", "true"], capture_output=True).returncode:
        assert not os.environ.get("CI"), "CI has to have namespaces"
        pytest.skip("the kernel allows no namespaces here")
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def head(world) -> Iterator[World]:
    """The same with a cluster of one host."""
    world.host(HEAD, cpus=1)
    yield world
    world.kill()


def on_ray(tmp_path, data, *, trials, epochs, **ray) -> Sweep:
    search = search_with(executor="ray", ray=ray, workers=2, budget={"trials": trials}, pruner={"name": "none"})
    return Sweep(tmp_path, data, search, (f"trainer.max_epochs={epochs}",))


def test_interrupted_on_a_ray_of_its_own_it_leaves_no_process_and_goes_on(world, tmp_path, digits_data):
    sweep = on_ray(tmp_path, digits_data, trials=2, epochs=30, num_cpus=0.5)
    process = world.search(sweep)
    _wait_for(lambda: running(sweep.trials()), process)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 130, printed
    assert "RUNNING" not in states(sweep.trials())
    assert "Traceback" not in printed
    assert {tags(run)["trial.state"] for run in sweep.runs()} == {"interrupted"}
    deadline = time.monotonic() + 30
    while left := world.processes():  # such as a deliverer that has nothing to do
        assert time.monotonic() < deadline, [p.cmdline() for p in left]
        time.sleep(0.2)
    process = world.search(sweep)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert "runs on Ray: 1 host" in printed
    assert states(sweep.trials()) == ["COMPLETE"] * 2
    assert "going on from" in "".join(log.read_text() for log in (tmp_path / "search").glob("worker-*.log"))


def test_a_killed_hosts_trial_is_run_again_and_none_twice(head, tmp_path, digits_data, store_db, rows):
    sweep = on_ray(tmp_path, digits_data, trials=4, epochs=8, num_cpus=1, address=f"{hosts[HEAD]}:6379")
    host = head.host(LOST, cpus=1)
    process = head.search(sweep)

    def there(trials):
        return [t for t in running(trials) if t.user_attrs["worker"].startswith(f"{LOST}/")]

    _wait_for(lambda: there(sweep.trials()), process)
    (lost,) = there(sweep.trials())
    host.kill()
    printed = process.communicate(timeout=400)[0]
    assert process.returncode == 0, printed
    assert f"trial {lost.number}: its worker on {LOST} was lost: its host" in printed
    trials = sweep.trials()
    assert states(trials) == ["COMPLETE"] * 4
    again = trials[lost.number]
    assert (again.params, again.user_attrs["retries"]) == (lost.params, 1)
    assert again.user_attrs["worker"].startswith(f"{HEAD}/")
    assert not [t.number for t in trials if "retries" in t.user_attrs and t.number != lost.number]
    runs = sweep.runs()
    finished = [int(tags(run)["trial.number"]) for run in runs if status(run) == "FINISHED"]
    assert sorted(finished) == list(range(4))
    assert [tags(run)["trial.state"] for run in runs if status(run) != "FINISHED"] == ["lost"]
    sync(sweep.spool, f"sqlite:///{store_db}")
    told = rows(store_db, "select status, count(*) from runs where name like 'trial %' group by 1 order by 1")
    assert told == [("FINISHED", 4), ("KILLED", 1)]
    assert not list((tmp_path / "search").glob(".search-*"))


def train_on_ray(world, folder, data, *, epochs, retries) -> subprocess.Popen[str]:
    """Start a training of the digits by two workers."""
    (folder / "data").mkdir()
    (folder / "data/prepared").symlink_to(data)
    return world.start(
        *(str(BIN / "cnn-tuning"), "train-on-ray", f"--address={hosts[HEAD]}:6379"),
        *(f"--data={folder / 'data/prepared'}", f"--outputs={folder / 'out'}", f"--retries={retries}"),
        *("experiment=digits", f"trainer.max_epochs={epochs}", "trainer.threads=1"),
        "trainer.checkpoint_every_s=0.1",
        *(f"tracking.uri=sqlite:///{folder}/mlflow.db", f"tracking.spool={folder}/spool"),
        stdout=subprocess.PIPE,
    )


def test_with_a_wrong_token_it_ends_with_a_line_that_tells_none(head, tmp_path, digits_data, monkeypatch):
    own, wrong = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text(), secrets.token_hex(32)
    (tmp_path / "token").write_text(wrong)
    monkeypatch.setitem(head.env, "RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    process = train_on_ray(head, tmp_path, digits_data, epochs=1, retries=0)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 1, printed
    assert len(printed.strip().splitlines()) == 1, printed
    assert f"Ray at {hosts[HEAD]}:6379 refuses the token, so RAY_AUTH_TOKEN_PATH must name a copy" in printed
    assert own not in printed
    assert wrong not in printed


def test_a_training_is_spread_over_two_hosts(head, tmp_path, digits_data):
    second = head.host(SECOND, cpus=1)
    process = train_on_ray(head, tmp_path, digits_data, epochs=2, retries=0)
    printed = process.communicate(timeout=400)[0]
    second.kill()
    assert process.returncode == 0, printed
    assert f"{tmp_path / 'out/models/baseline'}: epoch" in printed
    assert (tmp_path / "out/models/baseline/history.csv").read_text().count("\n") == 3
    assert [start["kind"] for start in _starts(tmp_path / "spool")] == ["train"]


def test_a_training_that_loses_a_host_goes_on_from_its_checkpoint_on_another(head, tmp_path, digits_data):
    others = [head.host(name, cpus=1) for name in OTHERS]  # with the first one more than it takes
    process = train_on_ray(head, tmp_path, digits_data, epochs=40, retries=1)
    log = tmp_path / "out/.state/ray/rank-0.log"
    _wait_for(lambda: list((tmp_path / "out/.state").rglob("*.ckpt")), process)
    next(host for host in others if _trains(host)).kill()
    printed = process.communicate(timeout=400)[0]
    for host in others:
        host.kill()
    assert process.returncode == 0, printed + log.read_text()
    assert "going on from" in log.read_text()
    epochs = [line.split(",")[0] for line in (tmp_path / "out/models/baseline/history.csv").open()][1:]
    assert [float(epoch) for epoch in epochs] == list(range(1, 41))


def test_two_workers_share_a_gpu_and_poor_trials_are_given_up(head, tmp_path, digits_data):
    host = head.host(GPU, cpus=1, gpus=1)
    rates = {"optimizer.learning_rate": {"kind": "categorical", "choices": [0.01, 0.02, 1e-7, 1e-8]}}
    ray = {"num_cpus": 0.5, "num_gpus": 0.5, "address": f"{hosts[HEAD]}:6379"}
    given = {"space": rates, "sampler": {"name": "grid"}, "pruner": {"name": "median", "startup_trials": 1}}
    search = search_with(executor="ray", ray=ray, workers=2, **given)
    sweep = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=30", "trainer.accelerator=cpu"))
    process = head.search(sweep)

    def at_once():
        return {t.user_attrs["worker"] for t in sweep.trials() if t.state.name == "RUNNING"}

    _wait_for(lambda: len(at_once()) == 2, process)
    assert all(worker.startswith(f"{GPU}/") for worker in at_once())
    workers = [p for p in head.processes() if "cnn_tuning.search.worker" in p.cmdline()]
    assert [p.environ()["CUDA_VISIBLE_DEVICES"] for p in workers] == ["0", "0"]
    printed = process.communicate(timeout=400)[0]
    host.kill()
    assert process.returncode == 0, printed
    assert "1 GPUs; a worker takes 0.5 CPUs and 0.5 GPUs" in printed
    assert states(sweep.trials()) == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]


def test_a_host_that_does_not_see_the_data_ends_the_search_with_a_line(head, tmp_path, digits_data):
    # The last of all: its host stays in the cluster.
    head.host(BARE, cpus=2, hides=digits_data)
    sweep = on_ray(tmp_path, digits_data, trials=2, epochs=1, num_cpus=2, address=f"{hosts[HEAD]}:6379")
    process = head.search(sweep)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert f"host {BARE}: no data in {digits_data}: share the project's folder with all hosts" in printed
    assert states(sweep.trials()) == ["WAITING"] * 2


def _trains(host: subprocess.Popen) -> bool:
    processes = psutil.Process(host.pid).children(recursive=True)
    return any("cnn_tuning.stages.ray_training" in process.cmdline() for process in processes)


def _starts(spool: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text().splitlines()[0]) for file in spool.glob("*.jsonl")]
