"""What the pages share: a template of this folder and its values in, one self-contained page out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path


def render(template: str, **values: object) -> str:
    """Return a page of this folder's template; text is escaped, and a missing value is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**values)


def embedded(pictures: Sequence[tuple[str, Path]]) -> list[tuple[str, str]]:
    """Return (caption, PNG in base64)."""
    return [(caption, base64.b64encode(png.read_bytes()).decode()) for caption, png in pictures]
