"""`report.html`: one self-contained page from top to bottom, from the tables and pictures of `evaluate`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_page(
    out: Path,
    *,
    title: str,
    headline: str,
    figures: Sequence[Mapping[str, str]],
    classes: Sequence[Mapping[str, str]],
    pictures: Sequence[tuple[str, Path]],
    facts: Mapping[str, str],
) -> None:
    """Write the page; `pictures` are (caption, PNG) and are put inside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    encoded = [(caption, base64.b64encode(png.read_bytes()).decode()) for caption, png in pictures]
    text = environment.get_template(TEMPLATE.name).render(
        title=title, headline=headline, figures=figures, classes=classes, pictures=encoded, facts=facts
    )
    out.write_text(text, encoding="utf-8")
