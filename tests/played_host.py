"""The host's part of a run, played: it writes into the bucket what a host writes, and EC2 loses it as it may."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from moto.ec2.models import ec2_backends
from moto.ec2.models.instances import StateReason
from renting import ACCOUNT, REGION

from cnn_tuning.cloud import follow, inventory
from cnn_tuning.cloud.aws import Aws
from cnn_tuning.cloud.names import as_mapping

RUN = "run-one"
BUCKET = "a-bucket"
LOCK = "schema: '2.0'\nstages:\n  configure:\n    cmd: x\n    outs:\n    - path: params.lock.yaml\n      md5: x\n"


class PlayedHost:
    """One step of its part is played whenever the laptop waits for its next look."""

    def __init__(self, aws: Aws, run: str = RUN) -> None:
        self.aws, self.run = aws, run
        self.passed = timedelta()
        self.waiting: Iterator[Callable[[], object]] = iter(())

    def plays(self, *steps: Callable[[], object]) -> None:
        """Take these steps, one a look."""
        self.waiting = iter(steps)

    def step(self) -> None:
        """Take the next one."""
        step = next(self.waiting, None)
        assert step is not None, "the host has played its part, and the laptop looks on"
        step()

    @property
    def attempt(self) -> int:
        """Return which host of the run plays now."""
        return int(as_mapping(self.instance["Tags"])["attempt"])

    @property
    def instance(self) -> dict[str, Any]:
        """Return the instance that lives."""
        [item] = inventory.instances(self.aws, "cnn-tuning", self.run)
        return item

    def put(self, name: str, body: bytes | str | dict) -> None:
        """Write one object."""
        data = json.dumps(body) if isinstance(body, dict) else body
        self.aws.client("s3").put_object(Bucket=BUCKET, Key=f"cnn-tuning/runs/{self.run}/{name}", Body=data)

    def get(self, name: str) -> bytes | None:
        """Return one object."""
        listed = self.aws.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=f"cnn-tuning/runs/{self.run}/{name}")
        if not listed["KeyCount"]:
            return None
        key = f"cnn-tuning/runs/{self.run}/{name}"
        return self.aws.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def tells(self, state: str, exit_: int = 0, stage: str = "end") -> Callable[[], None]:
        """Return the step of writing its state."""

        def step() -> None:
            told = {"run": self.run, "attempt": self.attempt, "state": state, "exit": exit_, "stage": stage}
            self.put("state.json", {**told, "at": self.now(), "instance": self.instance["InstanceId"]})

        return step

    def prints(self, stage: str, *lines: str) -> Callable[[], None]:
        """Return the step of writing its progress."""
        return lambda: self.put("progress.json", {"at": self.now(), "stage": stage, "lines": list(lines)})

    def leaves(self, **objects: bytes | str) -> Callable[[], None]:
        """Return the step of writing its results (`__` for a dot)."""

        def step() -> None:
            for name, body in objects.items():
                self.put(name.replace("__", "."), body)

        return step

    def gone(self, code: str = "Server.SpotInstanceTermination") -> Callable[[], None]:
        """Return the step of being taken away."""

        def step() -> None:
            machine = ec2_backends[ACCOUNT][REGION].get_instance(self.instance["InstanceId"])
            machine.terminate()
            machine.state_reason = StateReason(code, code)
            machine._reason = f"Gone ({datetime.now(UTC) + self.passed:%Y-%m-%d %H:%M:%S} GMT)"

        return step

    def waits(self, **time: float) -> Callable[[], None]:
        """Return the step of letting time pass."""

        def step() -> None:
            self.passed += timedelta(**time)

        return step

    def now(self) -> str:
        """Return the played time, as hosts write it."""
        return (datetime.now(UTC) + self.passed).strftime("%Y-%m-%dT%H:%M:%SZ")

    def at_once(self, *steps: Callable[[], object]) -> Callable[[], None]:
        """Return several steps as one."""

        def step() -> None:
            for each in steps:
                each()

        return step


@pytest.fixture
def played(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> PlayedHost:
    """The host of run `run-one`, with its bucket and its clock."""
    aws.client("s3").create_bucket(Bucket=BUCKET)
    host = PlayedHost(aws)
    monkeypatch.setattr(follow, "pause", host.step)
    monkeypatch.setattr(inventory, "utc_now", lambda: datetime.now(UTC) + host.passed)
    return host


def ends_well(played: PlayedHost) -> tuple[Callable[[], object], ...]:
    """Return the steps of a host that does its work."""
    return (
        played.tells("started", stage="install"),
        played.prints("train", "epoch 1 of 8", f"epoch 2 of 8, account {ACCOUNT}"),
        played.at_once(
            played.waits(minutes=6),
            played.leaves(dvc__lock=LOCK, params__lock__yaml="experiment: mnist\n", boot__log="done\n"),
            played.tells("finished"),
        ),
    )


def spooled(key: str, events: Iterable[dict[str, Any]], **changes: Any) -> bytes:
    """Return the events of an MLflow run as a host on another machine spools them."""
    about = {"name": "baseline", "kind": "train", "experiment": "mnist", "uri": "sqlite:////opt/x/mlflow.db",
             "parent": None, "tags": {}, "price_per_hour": 0.0, "system_metrics_every_s": 0,
             "pid": 1, "created": 1.0, "host": "ip-10-0-0-1", **changes}  # fmt: skip
    at = round(datetime.now(UTC).timestamp() * 1000)
    lines = [{"event": "start", "at": at, **about}, *({"at": at, **event} for event in events)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
