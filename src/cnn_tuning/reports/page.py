"""What the pages share: a template of this folder and its values in, one self-contained page out."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# A picture in a page has at most so many pixels a side; above so many it is written with losses.
MOST_PIXELS, MOST_LOSSLESS = 160, 64


def render(template: str, **values: object) -> str:
    """Return a page of this folder's template; text is escaped, and a missing value is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**values)


def embedded(pictures: Sequence[tuple[str, Path]]) -> list[tuple[str, str]]:
    """Return (caption, PNG in base64)."""
    return [(caption, base64.b64encode(png.read_bytes()).decode()) for caption, png in pictures]


def data_uri(picture: NDArray[np.uint8]) -> str:
    """Return a small picture (H×W×3) as the address of an image inside the page."""
    from PIL import Image

    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    kind = "png" if max(image.size) <= MOST_LOSSLESS else "jpeg"
    image.save(file, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
