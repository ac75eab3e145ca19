"""Bring a backbone's pretrained weights into `models/pretrained/`: `python -m cnn_tuning.stages.fetch_weights`.

By hand with `--outputs .` they come where trainings look for them. As an output of the pipeline they go to the
project's remote, so that another machine needs neither hub nor index.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cnn_tuning.config import ModelConfig, SourceConfig, WeightsConfig, WeightsSourceConfig
from cnn_tuning.errors import UserError, redact
from cnn_tuning.stages.command import Place, empty_folder, stage
from cnn_tuning.training.pretrained import FOLDER, Source, write, write_source

CACHE = Path(".sources")
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class FetchWeightsConfig:
    """The sections that this stage reads."""

    model: ModelConfig


def run(config: FetchWeightsConfig, place: Place) -> None:
    """Write the weights under the network's own names; nothing where the model is not pretrained."""
    model, out = config.model, place.outputs / FOLDER
    empty_folder(out)
    if not model.pretrained:
        write_source(out, {"pretrained": False})
        click.echo(f"{out}: model {model.name} is not pretrained, nothing to fetch")
        return
    if model.architecture != "backbone" or model.weights is None:
        raise UserError("model.pretrained: true needs model.architecture: backbone and model.weights")
    path, origin = obtain(model.weights, CACHE)
    try:
        count = convert(model, model.weights, path, out)
    finally:
        _forget(path, CACHE)
    click.echo(f"{out}: {count} tensors of {model.arguments.get('name')} from {origin}")


def obtain(weights: WeightsConfig, cache: Path) -> tuple[Path, str]:
    """Return the file from the first source that has it, and which that was.

    Raises:
        UserError: no source has it (with every reason), or its digest is not known yet.
    """
    from cnn_tuning.data.digests import sha256_of
    from cnn_tuning.data.transports import SourceError

    failures: list[str] = []
    for source in weights.sources:
        try:
            path = _from(source, weights.file, cache)
            digest = sha256_of(path)
        except (SourceError, OSError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            failures.append(redact(f"{source.uri}: {reason}"))
            print(f"fetch_weights: {failures[-1]}", file=sys.stderr)
            continue
        if weights.sha256 is None:
            raise UserError(
                f"model.weights.sha256 is missing, and a recipe has to name its weights: {weights.file} from "
                f"{redact(source.uri)} has\n  sha256: {digest}\nwrite this under model.weights if you trust it"
            )
        if digest == weights.sha256:
            return path, redact(source.uri)
        _forget(path, cache)
        failures.append(redact(f"{source.uri}: hash mismatch: sha256 is {digest}, expected {weights.sha256}"))
        print(f"fetch_weights: {failures[-1]}", file=sys.stderr)
    tried = "\n".join(f"  {failure}" for failure in failures) or "  model.weights.sources is empty"
    raise UserError(
        f"no source gave the pretrained weights {weights.file}:\n{tried}\n"
        f"  Put the file into a folder of your own and set model.weights.sources: [{{uri: 'file:FOLDER/'}}], "
        "or train from scratch: model.pretrained: false"
    )


def _from(source: WeightsSourceConfig, file: str, cache: Path) -> Path:
    """Return a local copy of the file that a source holds."""
    from cnn_tuning.data import sources

    uri = _hub(source.uri) if source.uri.startswith("hub:") else source.uri
    whole = SourceConfig(uri, sha256=source.sha256, region=source.region, unsigned=source.unsigned)
    held = cache / hashlib.sha256(uri.encode()).hexdigest()[:16]
    with sources.progress() as bar:
        return sources.obtained(whole, source.member or file, held, bar(file), None)


def _forget(path: Path, cache: Path) -> None:
    """Remove a copy that was fetched, not a file of the person's own."""
    if path.is_relative_to(cache):
        path.unlink()


def _hub(uri: str) -> str:
    """Return the folder's URL for `hub:owner/name` or `hub:owner/name@revision`."""
    repository, _, revision = uri.removeprefix("hub:").partition("@")
    endpoint = os.environ.get("HF_ENDPOINT") or HUB
    return f"{endpoint.rstrip('/')}/{repository}/resolve/{revision or 'main'}/"


def convert(model: ModelConfig, weights: WeightsConfig, path: Path, out: Path) -> int:
    """Write the file's tensors under the names of the model's trunk; return how many."""
    # Imported here: without pretrained weights this stage needs neither torch nor a library of networks.
    from cnn_tuning.models.backbone import build_trunk, original
    from cnn_tuning.models.weights import by_order, of_trunk, read_tensors

    chosen = {key: model.arguments[key] for key in ("library", "name", "auxiliary") if key in model.arguments}
    library, name = chosen.setdefault("library", "timm"), chosen.setdefault("name", "resnet50")
    tensors = read_tensors(path)
    if weights.mapping == "by_order":
        # With the library's own classifier, in whose order the file was written.
        tensors = by_order(tensors, original(library, name, auxiliary=chosen.get("auxiliary", False)))
    side = 299 if chosen.get("auxiliary") else 224
    trunk = build_trunk(shape=(3, side, side), classes=1000, **chosen)
    tensors = of_trunk(tensors, trunk)
    mean, std, interpolation = _pictures(weights, library, name, trunk)
    write(out, tensors, Source(library, name, str(weights.sha256), mean, std, interpolation))
    return len(tensors)


def _pictures(
    weights: WeightsConfig, library: str, name: str, trunk: Any
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Return mean, spread and interpolation of the pictures that were learnt from."""
    if library == "timm":
        known = trunk.pretrained_cfg
        told = (known.get("mean"), known.get("std"), known.get("interpolation"))
    else:
        from torchvision import models

        preset: Any = models.get_model_weights(name).DEFAULT.transforms()
        told = (preset.mean, preset.std, preset.interpolation.value)
    mean, std, interpolation = weights.mean or told[0], weights.std or told[1], weights.interpolation or told[2]
    return tuple(mean), tuple(std), str(interpolation)


if __name__ == "__main__":
    stage(FetchWeightsConfig, run, "Fetch the backbone's pretrained weights, checked, from the first source.")
