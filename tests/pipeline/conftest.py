"""One project whose pipeline has run on the real digits: shared by the tests that only look at it."""

from __future__ import annotations

import pytest
from project import Project

DIGITS = "experiment: digits\nseed: 0\n"


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("digits") / "project", DIGITS)
    project.printed = project.repro()
    return project
