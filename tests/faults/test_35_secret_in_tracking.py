"""Row 35: secrets in configuration, environment, tags and URIs appear in no spool, store, message or error."""

import subprocess
import sys

import pytest
from filelock import FileLock
from striking import by_hand  # noqa: F401

from cnn_tuning.errors import HIDDEN, UserError, redact
from cnn_tuning.tracking.run import Run

CANARY = "cAnArY-5f2d91b7"
NAMES = ("notes.yaml", "page.html", "table.csv")

SCRIPT = """
import os, sys
from pathlib import Path
from cnn_tuning.config import TrackingConfig
from cnn_tuning.tracking.run import Run
canary = os.environ["AWS_SECRET_ACCESS_KEY"]
uri, spool = sys.argv[1:]
config = TrackingConfig(name="t", experiment="tests", uri=uri, spool=spool, wait_s=10.0)
params = {"data.source": f"https://user:{canary}@host/x", "hf_token": canary, "list": [f"password={canary}"],
          "nested": [{"api_key": canary}], "seed": 1}
Path("notes.yaml").write_text(f"hub_token: {canary}\\nseed: 1\\n")
Path("page.html").write_text(f"<p>hub_token: {canary}</p><img src='data:image/png;base64,aGk='>" + 1_100_000 * " ")
Path("table.csv").write_text(f"path\\ns3://key:{canary}@bucket/x\\n")
with Run.start(config, name=f"run {canary}", kind="train", params=params, tags={"why": f"token: {canary}"}) as run:
    run.set_tags({"DB_PASSWORD": canary})
    run.log_dataset(name="d", digest="x" * 36, source=f"s3://key:{canary}@bucket/x", split="train")
    for name in ("notes.yaml", "page.html", "table.csv"):
        run.log_artifact(Path(name))
    run.finish()
with Run.start(config, name="fails", kind="train", params={}) as run:
    raise SystemExit(f"cannot open https://user:{canary}@host/x")
"""


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("SOME_URL", f"https://user:{CANARY}@host")


def _bytes_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("server", ["reachable", "down"])
def test_no_output_holds_the_canary(server, environment, tmp_path, store_db, tracking):
    uri = f"sqlite:///{store_db}" if server == "reachable" else f"http://user:{CANARY}@127.0.0.1:1"
    tracking()  # waits for the deliverer at the end
    before = set(_bytes_of(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, uri, str(tmp_path / "spool")], capture_output=True, cwd=tmp_path, timeout=60
    )
    assert CANARY.encode() in done.stderr  # Python itself prints what the caller's own SystemExit says
    ours = b"\n".join(line for line in done.stderr.splitlines() if not line.startswith(b"cannot open"))
    assert CANARY.encode() not in ours + done.stdout
    with FileLock(tmp_path / "spool/deliver.lock", timeout=60):  # all that can be delivered is
        written = _bytes_of(tmp_path)
    for name in NAMES:
        assert CANARY.encode() in written.pop(tmp_path / name)  # the user's own file
    assert set(written) - before, "nothing was written"
    assert [path for path, content in written.items() if CANARY.encode() in content] == []
    if server == "reachable":
        assert b"data.source" in store_db.read_bytes()
        arrived = {path.name: content for path, content in written.items() if "artifacts" in path.parts}
        assert set(NAMES) <= set(arrived)
        assert [name for name in NAMES if HIDDEN.encode() not in arrived[name]] == []


@pytest.mark.slow
def test_no_output_of_a_training_holds_the_canary(by_hand):  # noqa: F811
    command = (sys.executable, "-m", "cnn_tuning.stages.train", "trainer.max_epochs=1", "--outputs", ".")
    uri = f"http://me:{CANARY}@127.0.0.1:1"
    process = by_hand.start(*command, AWS_SECRET_ACCESS_KEY=CANARY, MLFLOW_TRACKING_URI=uri)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert "http://***@127.0.0.1:1 is not reachable" in printed  # it had the secret, and no server
    by_hand.until_nobody_is_left()
    assert (by_hand.path / "results/training/profile.html").exists()
    assert list((by_hand.path / ".state/spool").glob("*.jsonl"))
    written = {path: content for path, content in _bytes_of(by_hand.path).items() if ".git" not in path.parts}
    assert CANARY not in printed
    assert [path for path, content in written.items() if CANARY.encode() in content] == []


def test_the_password_of_the_uri_is_used_but_not_shown(tracking, monkeypatch):
    uri = f"http://user:{CANARY}@127.0.0.1:1"
    with pytest.raises(UserError, match=r"http://\*\*\*@127.0.0.1:1") as caught:
        Run.start(tracking(uri=uri, on_unreachable="stop"), name="n", kind="train", params={})
    assert CANARY not in str(caught.value)
    from cnn_tuning.tracking.store import with_password

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert with_password(redact(uri)) == uri
