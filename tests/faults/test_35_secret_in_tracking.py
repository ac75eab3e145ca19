"""Row 35: secrets in configuration, environment, tags and URIs appear in no spool, store, message or error."""

import subprocess
import sys

import pytest

from cnn_tuning.errors import UserError, redact
from cnn_tuning.tracking.run import Run

CANARY = "cAnArY-5f2d91b7"

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
    written = _bytes_of(tmp_path)
    for name in ("notes.yaml", "page.html", "table.csv"):
        assert CANARY.encode() in written.pop(tmp_path / name)  # the user's own file
    assert set(written) - before, "nothing was written"
    assert [path for path, content in written.items() if CANARY.encode() in content] == []
    if server == "reachable":
        assert b"data.source" in store_db.read_bytes()


def test_the_password_of_the_uri_is_used_but_not_shown(tracking, monkeypatch):
    uri = f"http://user:{CANARY}@127.0.0.1:1"
    with pytest.raises(UserError, match=r"http://\*\*\*@127.0.0.1:1") as caught:
        Run.start(tracking(uri=uri, on_unreachable="stop"), name="n", kind="train", params={})
    assert CANARY not in str(caught.value)
    from cnn_tuning.tracking.store import with_password

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert with_password(redact(uri)) == uri
