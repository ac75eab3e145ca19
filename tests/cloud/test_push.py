"""What finished stages made goes to the DVC remote by a real `dvc push`, also over a way that is cut."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from agents import attempt_of
from cutting import Way
from project import BIN
from seaweed import BUCKET, REGION, _weed, seaweed  # noqa: F401

from cnn_tuning.cloud.pulling import pull
from cnn_tuning.errors import UserError

pytestmark = pytest.mark.slow

REMOTE = "cnn-tuning/cut-push"
FILES = {f"models/{number}.bin": bytes([number]) * 300_000 for number in range(12)}
MAKE = "import pathlib\npathlib.Path('models').mkdir(exist_ok=True)\n" + "".join(
    f"pathlib.Path({name!r}).write_bytes(bytes([{content[0]}]) * {len(content)})\n"
    for name, content in FILES.items()
)
CONFIG = f"""
[core]
    remote = storage
    no_scm = true
['remote "storage"']
    url = s3://{BUCKET}/{REMOTE}
    verify = true
    jobs = 1
"""


@pytest.fixture
def made(tmp_path, seaweed, monkeypatch):  # noqa: F811
    """A project on a host whose one stage has run, and is not pushed."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "DVC_"))]:
        monkeypatch.delenv(name)
    for name, value in {**seaweed.environment, "DVC_NO_ANALYTICS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    project = tmp_path / "project"
    (project / ".dvc").mkdir(parents=True)
    (project / ".dvc/config").write_text(CONFIG)
    (project / "make.py").write_text(MAKE)
    (project / "dvc.yaml").write_text("stages: {make: {cmd: python make.py, deps: [make.py], outs: [models]}}\n")
    subprocess.run(["dvc", "repro", "--quiet"], cwd=project, check=True)
    return project


def test_a_push_that_is_cut_goes_on_with_what_is_missing(made, seaweed, monkeypatch):  # noqa: F811
    attempt = attempt_of(made, seaweed)
    put = f"PUT /{BUCKET}/{REMOTE}".encode()
    with Way(seaweed.port, put, allowed=5).open() as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        with pytest.raises(UserError, match=r"^dvc push: "):
            attempt.push()
        assert way.cut  # the fault is real: the sixth object was cut in its middle
        assert len(seaweed.keys(REMOTE)) == way.passed == 5
        way.mend()
        attempt.push()
        assert way.passed == len(FILES) + 1  # each once, with the list of the folder
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.url)
    for name in ("models", ".dvc/cache"):
        shutil.rmtree(made / name)
    pull(made, REGION)
    assert {name: (made / name).read_bytes() for name in FILES} == FILES
