"""Commits of a working tree with uncommitted changes, as hosts run them: they are known by who made them."""

from __future__ import annotations

from collections.abc import Mapping

MAKER = "cnn-tuning@localhost"
# As variables: those that a person has exported would come before Git's settings.
AS_MAKER: Mapping[str, str] = {
    "GIT_AUTHOR_NAME": "cnn-tuning",
    "GIT_AUTHOR_EMAIL": MAKER,
    "GIT_COMMITTER_NAME": "cnn-tuning",
    "GIT_COMMITTER_EMAIL": MAKER,
}
