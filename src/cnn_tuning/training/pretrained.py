"""Pretrained weights between the stage `fetch_weights` and a training: `weights.safetensors` and `source.json`.

`weights.safetensors` holds the trunk's tensors under the network's own names; `source.json` says of which
network and file they are, and what pictures they were learnt from. The same weights give the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_tuning.config import ModelConfig
from cnn_tuning.errors import UserError

# Below the project's folder, in which every command runs.
FOLDER = Path("models/pretrained")
WEIGHTS = "weights.safetensors"
SOURCE = "source.json"
REMEDY = "run `dvc repro fetch_weights`"


@dataclass(frozen=True)
class Source:
    """Of which network and file the weights are; `mean`, `std` per channel and `interpolation` of its pictures."""

    library: str
    name: str
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def write(folder: Path, tensors: dict[str, Any], source: Source) -> None:
    """Write both files into an existing folder."""
    from safetensors.torch import save

    (folder / WEIGHTS).write_bytes(save(tensors))
    write_source(folder, {"pretrained": True, **dataclasses.asdict(source)})


def write_source(folder: Path, content: dict[str, Any]) -> None:
    """Write `source.json`."""
    (folder / SOURCE).write_text(json.dumps(content, indent=1) + "\n")


def source_for(model: ModelConfig, folder: Path = FOLDER) -> Source:
    """Return what lies in `folder`, which must be the weights that the model names.

    Raises:
        UserError: they are missing, or of another file or network.
    """
    wanted = (model.arguments.get("library", "timm"), model.arguments.get("name"))
    if model.weights is None or model.weights.sha256 is None:
        raise UserError(f"model.weights.sha256 is missing: {REMEDY}, which says what to write")
    try:
        content = json.loads((folder / SOURCE).read_text())
        if not content.pop("pretrained"):
            raise UserError(f"{folder} holds no weights, and model.pretrained is true: {REMEDY}")
        source = Source(**content)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / SOURCE} is missing or damaged: {REMEDY}") from None
    if (source.library, source.name) != wanted:
        held = f"{source.library}'s {source.name}, not of {wanted[0]}'s {wanted[1]}"
        raise UserError(f"{folder} holds weights of {held}: {REMEDY} for this model")
    if source.sha256 != model.weights.sha256:
        raise UserError(
            f"{folder} holds weights of SHA-256 {source.sha256[:12]}…, model.weights names "
            f"{model.weights.sha256[:12]}…: {REMEDY}"
        )
    return dataclasses.replace(source, mean=tuple(source.mean), std=tuple(source.std))


def load_into(trunk: Any, folder: Path = FOLDER) -> None:
    """Give a trunk the weights that lie in `folder`."""
    from cnn_tuning.models.weights import put_into, read_tensors

    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS} is missing: {REMEDY}")
    put_into(trunk, read_tensors(folder / WEIGHTS))
