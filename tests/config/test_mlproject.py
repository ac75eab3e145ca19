"""`MLproject`: what a person writes after `-P overrides=` arrives word for word."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
import yaml
from project import ROOT

ENTRIES = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]


@pytest.mark.parametrize("entry", sorted(name for name in ENTRIES if "parameters" in ENTRIES[name]))
def test_overrides_are_taken_apart_at_blanks_and_for_no_file_names(tmp_path, entry):
    (tmp_path / "data.image.size=8").touch()  # what [8,8] would stand for
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    overrides = "data.image.size=[8,8] trainer.max_epochs=1"
    command = ENTRIES[entry]["command"].format(overrides=shlex.quote(overrides), inputs=shlex.quote("."))
    printed = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    ).stdout.splitlines()  # fmt: skip
    assert printed[:2] == ["-m", f"cnn_tuning.stages.{entry}"]
    assert printed[-2:] == overrides.split()
