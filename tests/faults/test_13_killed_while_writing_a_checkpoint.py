"""Row 13: SIGKILL while a checkpoint is written; the one before loads, and the end is as if undisturbed."""

from __future__ import annotations

import json
import signal

import pytest
from striking import SAVING, by_hand  # noqa: F401


@pytest.mark.slow
def test_13_killed_at_each_point_of_the_write(by_hand):  # noqa: F811
    known = None
    for point in ("open", "byte", "rename", "manifest", "manifest-rename"):
        process = by_hand.stage("train", *SAVING, at=f"{point} 4")
        printed, _ = process.communicate(timeout=200)
        assert process.returncode == (-signal.SIGXFSZ if point == "byte" else -signal.SIGKILL), printed
        went_on(printed, known)
        known = last_known(by_hand, point)
        assert not list(by_hand.path.glob("models/baseline/*"))
    printed, _ = by_hand.stage("train", *SAVING).communicate(timeout=200)
    went_on(printed, known)
    assert weights(by_hand) == undisturbed(by_hand)
    assert not list((by_hand.path / ".state/train").glob("*"))  # no half-written file stays
    ends = by_hand.ends()
    assert ends[-1] == "FINISHED"
    assert "RUNNING" not in ends


def went_on(printed, known):
    """Check that a run went on from the last checkpoint that was told of as whole."""
    assert (f"going on from {known[0]} at step {known[1]} " in printed) if known else "going on" not in printed


def last_known(project, point):
    """Return what has to load, after proof that the kill came where it was meant to."""
    (state,) = (project.path / ".state/train").iterdir()
    entry = json.loads((state / "checkpoints.json").read_text())[-1]
    newer = state / f"step-{entry['step'] + 1:08d}.ckpt"
    partial, whole = newer.with_suffix(".partial"), (state / entry["file"]).stat().st_size
    written = partial.stat().st_size if partial.exists() else 0
    assert written == pytest.approx({"byte": 20_000, "rename": whole}.get(point, 0), rel=0.05)
    assert newer.exists() == point.startswith("manifest")
    assert (state / "checkpoints.partial").exists() == (point == "manifest-rename")
    return (state / entry["file"]).relative_to(project.path), entry["step"]


def weights(project):
    return json.loads(project.text("models/baseline/model.json"))["weights_sha256"]


def undisturbed(project):
    """Return the digest that a run without a kill ends with."""
    printed, _ = project.stage("train", *SAVING).communicate(timeout=200)
    assert "going on" not in printed
    return weights(project)
