"""Configurations as tests compose them: in the project's folder, and what is said of those that are refused."""

from __future__ import annotations

import pytest
from project import ROOT

from cnn_tuning.config import compose
from cnn_tuning.errors import UserError


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in the project's folder: for a whole module where it is imported."""
    monkeypatch.chdir(ROOT)


def refusal(overrides: tuple[str, ...] | list[str] = (), **where: object) -> str:
    """Return the text of the error with which a composition ends."""
    with pytest.raises(UserError) as caught:
        compose(overrides, **where)
    return str(caught.value)
