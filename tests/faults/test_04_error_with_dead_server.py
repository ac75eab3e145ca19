"""Row 4: the tracking server is dead when training fails; the user sees the training's own error."""

import subprocess
import sys
import time

SCRIPT = """
import sys
from cnn_tuning.config import TrackingConfig
from cnn_tuning.tracking.run import Run
config = TrackingConfig(name="t", experiment="tests", uri=sys.argv[1], spool=sys.argv[2])
with Run.start(config, name="fails", kind="train", params={}) as run:
    run.log_metrics({"train/loss": 1.0})
    print("training", flush=True)
    sys.stdin.readline()
    raise ZeroDivisionError("the step's own error")
"""


def test_the_original_error_comes_through(killable_mlflow_server, tmp_path):
    server = killable_mlflow_server
    spool = tmp_path / "spool"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.uri, str(spool)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "training\n"
    server.kill()
    assert not server.answers()
    began = time.monotonic()
    _, errors = process.communicate("go\n", timeout=30)
    assert time.monotonic() - began < 8
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1] == "ZeroDivisionError: the step's own error"
    assert errors.count("Traceback (most recent call last)") == 1
    assert server.uri in errors
    assert "cnn-tuning sync" in errors
    (events,) = spool.glob("*.jsonl")
    assert '"status":"FAILED","error":"ZeroDivisionError: the step\'s own error"' in events.read_text()
