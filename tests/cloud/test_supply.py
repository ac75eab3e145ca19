"""DVC from here: what it says is shown without account numbers, and a transfer that breaks off is one line."""

from __future__ import annotations

import io
import sys

import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import IncompleteReadError
from renting import ACCOUNT
from s3transfer.exceptions import RetriesExceededError

from cnn_tuning.cloud import supply
from cnn_tuning.cloud.aws import telling
from cnn_tuning.errors import UserError


class Terminal(io.StringIO):
    """Standard error in a terminal."""

    def isatty(self):
        return True


def test_no_account_number_is_shown_in_a_terminal(tmp_path, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(UserError) as told:
        supply.pull([f"arn:aws:iam::{ACCOUNT}:role/x"], tmp_path)
    assert "arn:aws:iam::***:role/x" in terminal.getvalue()
    assert ACCOUNT not in terminal.getvalue() + str(told.value)
    assert str(told.value).startswith("dvc pull: ") and "***" in str(told.value)


@pytest.mark.parametrize(
    "error",
    [
        IncompleteReadError(actual_bytes=1, expected_bytes=2),
        RetriesExceededError(OSError("gone")),
        S3UploadFailedError(f"Failed to upload to {ACCOUNT}:\nno"),
    ],
)
def test_a_transfer_that_breaks_off_is_one_line(error):
    with pytest.raises(UserError, match=r"^bucket b: ") as told, telling("bucket b"):
        raise error
    assert "\n" not in str(told.value) and ACCOUNT not in str(told.value)
