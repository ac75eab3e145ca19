"""`cnn-tuning init PATH` and `cnn-tuning stand-in NAME`.

`init`: a folder, an archive or an S3 prefix with a folder for each class comes in; `conf/experiment/NAME.yaml`
and a data sheet go out. `stand-in`: a data set's name comes in, an archive like the real one goes out.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from cnn_tuning import config
from cnn_tuning.config import DataConfig, FileConfig, ImageConfig, SourceConfig
from cnn_tuning.data.survey import Survey, survey
from cnn_tuning.errors import UserError

_CONF = Path("conf")
_SIDES = (8, 16, 28, 32, 48, 64, 96, 128, 160, 192, 224)
_BACKBONE_FROM = 96  # shorter side from which pictures are photographs that a pretrained network knows
_BACKBONE_SIDE = 224


@dataclass(frozen=True)
class Found:
    """Where pictures lie: a local folder to look at, and how an experiment names their source."""

    folder: Path
    files: dict[str, FileConfig]
    source: SourceConfig


def init(path: str, *, name: str | None, size: int | None, sheet: Path | None, force: bool) -> None:
    """Write an experiment for one's own pictures, and what there is to know of them."""
    name = _checked_name(name or re.sub(r"[^a-z0-9_]+", "_", _stem(path).lower()).strip("_"))
    target = _CONF / "experiment" / f"{name}.yaml"
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is missing: run this in the project's folder")
    if target.exists() and not force:
        raise UserError(f"{target} exists: choose another --name, or replace it with --force")
    from cnn_tuning.reports.survey import headline, notes, write_sheet

    with _found(path) as found:
        seen = survey(found.folder)
        if not seen.pictures:
            raise UserError(f"{path}: none of {len(seen.unreadable)} pictures can be read")
        where = sheet or Path("scratch/init") / name
        write_sheet(seen, name, path, where)
        text = experiment(name, found, seen, size)
    _write_checked(target, text, name)
    click.echo(headline(seen))
    for _, note in notes(seen):
        click.echo(f"  {note}")
    click.echo(f"{where}/sheet.html, sheet.json: the data sheet")
    click.echo(f"{target}: the experiment. Run it with\n  dvc exp run -S experiment={name}")
    click.echo(f"or write `experiment: {name}` into params.yaml and run `dvc repro`.")


def make_stand_in(name: str, out: Path | None, share: float, seed: int) -> None:
    """Draw an archive in place of one that is out of reach, and say how to use it."""
    from cnn_tuning.data.digests import sha256_of
    from cnn_tuning.data.stand_in import NAMES, make

    if name not in NAMES:
        raise UserError(f"no stand-in for {name}: there is one for {', '.join(NAMES)}")
    data = config.compose([f"data={name}"], params=None).data
    (file,) = data.files
    out = out or Path("downloads") / file
    made = make(name, out, share=share, seed=seed)
    pictures = ", ".join(f"{count:,} {split}" for split, count in made.items())
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {pictures}; drawn pictures, no photographs")
    settings = []
    if data.counts not in (None, made):
        settings.append(f"  counts: {{{', '.join(f'{split}: {n}' for split, n in made.items())}}}")
    if not data.files[file].unverified:
        settings.append(f"  files: {{{file}: {{md5: null, sha256: {sha256_of(out)}}}}}")
    if out != Path("downloads") / file:
        member = f", members: {{{file}: {out.name}}}" if out.name != file else ""
        settings.append(f"  sources: [{{uri: 'file:{out.parent}/'{member}}}]")
    if made["train"] <= (data.val_samples or 0):
        settings.append("  val_samples: null")
    if settings:
        click.echo("To use it, write into params.yaml:\ndata:\n" + "\n".join(settings))


def _stem(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].partition(".")[0] or "pictures"


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{name!r} is no name for an experiment: give --name of a letter, then a-z, 0-9 and _")
    if (_CONF / "data" / f"{name}.yaml").exists():
        raise UserError(f"{name!r} is the name of a data set in conf/data: choose another --name")
    return name


@contextmanager
def _found(path: str) -> Iterator[Found]:
    from cnn_tuning.data.archives import extract, is_archive
    from cnn_tuning.data.digests import sha256_of

    if path.startswith("s3://"):
        yield _found_in_s3(path)
        return
    place = Path(path).expanduser()
    if place.is_dir():
        yield Found(place, {}, SourceConfig(f"file:{place}/"))
    elif place.is_file() and is_archive(place):
        with tempfile.TemporaryDirectory(prefix="cnn-tuning-") as work:
            extract(place, Path(work) / "pictures")
            digest = FileConfig(sha256=sha256_of(place), bytes=place.stat().st_size)
            yield Found(Path(work) / "pictures", {place.name: digest}, SourceConfig(f"file:{place.parent}/"))
    elif place.exists():
        raise UserError(f"{path}: neither a folder nor a zip or tar archive")
    else:
        raise UserError(f"{path}: no such folder or archive")


def _found_in_s3(path: str) -> Found:
    """Copy the prefix into the cache, where `fetch` finds it again."""
    from cnn_tuning.data.prefix import mirror
    from cnn_tuning.data.sources import progress
    from cnn_tuning.data.transports import SourceError

    uri = path if path.endswith("/") else f"{path}/"
    reasons = []
    for unsigned in (False, True):  # with credentials where there are some, else as anyone
        source = SourceConfig(uri, unsigned=unsigned)
        try:
            with progress() as bar:
                return Found(mirror(source, Path(".sources"), bar), {}, source)
        except SourceError as error:
            reasons.append(f"{'without' if unsigned else 'with'} credentials: {error}")
    raise UserError(f"{uri}: " + "; ".join(reasons))


def experiment(name: str, found: Found, seen: Survey, size: int | None) -> str:
    """Return the YAML of an experiment that suits what was seen."""
    import yaml

    short = float(np.percentile(seen.sides, 25))
    backbone = short >= _BACKBONE_FROM and not seen.is_grey and (size is None or size >= _BACKBONE_FROM)
    side = size or (_BACKBONE_SIDE if backbone else max([s for s in _SIDES[:6] if s <= short], default=_SIDES[0]))
    # Bicubic: as the pretrained network is used to
    image = ImageConfig(
        (side, side), 1 if seen.is_grey else 3, interpolation="bicubic" if backbone else "bilinear"
    )
    data = _data(name, found, seen, image)
    counts = _split_sizes(data, seen)
    model = "efficientnet_lite0" if backbone else _small_model(side)
    batch = int(2 ** np.clip(np.floor(np.log2(max(1, counts["train"] // 10))), 3, 6))
    chosen = {
        "data": "image_folder",
        "augment": "none" if backbone or side < 16 else "shift" if seen.is_grey else "flip_crop_cutout",
        "model": model,
        "optimizer": "adamw",
        "schedule": "cosine" if backbone else "one_cycle",
        "search": "head" if backbone else "quick",
    }
    trainer: dict[str, Any] = {"max_epochs": 30 if counts["train"] < 5000 else 15, "batch_size": batch}
    trainer["label_smoothing"] = 0.1
    if backbone:
        trainer["finetune"] = {"trainable": "head"}
    tree = {
        "defaults": [{f"override /{group}": option} for group, option in chosen.items()],
        "experiment": name,
        "data": _plain(data),
        "optimizer": {"learning_rate": 0.003 if backbone else 0.002, "weight_decay": 0.01},
        "trainer": trainer,
    }
    sizes = ", ".join(f"{n:,} {split}" for split, n in counts.items())
    pictures = f"# {sizes} pictures of {len(seen.classes)} classes. Chosen by `cnn-tuning init`:"
    head = f"# @package _global_\n# dvc exp run -S experiment={name}\n{pictures}"
    why = (
        "the features of a pretrained network and a new head: few pictures are enough"
        if backbone
        else "a network that learns from these pictures alone"
    )
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return f"{head}\n# {why}.\n{text}"


def _small_model(side: int) -> str:
    return "resnet9" if side >= 32 else "compact_cnn" if side >= 24 else "compact_cnn_small"


def _data(name: str, found: Found, seen: Survey, image: ImageConfig) -> DataConfig:
    """Return the data set, held-out splits as large as so few pictures allow."""
    total, classes = len(seen.labels["train"]), len(seen.classes)
    test = 0.2 if "test" in seen.splits else _fraction(0.2, total, classes, total - 2 * classes)
    rest = total if "test" in seen.splits else total - round(test * total)
    wished = 0.1 if total >= 2000 else 0.15 if total >= 500 else 0.2
    val = wished if "val" in seen.splits else _fraction(wished, rest, classes, rest - classes)
    return DataConfig(
        name=name,
        format="image_folder",
        files=found.files,
        sources=(found.source,),
        image=image,
        val_fraction=val,
        test_fraction=test,
    )


def _fraction(wished: float, total: int, least: int, most: int) -> float:
    """Return the fraction nearest to the wished one that holds out `least` to `most` of the pictures."""
    count = min(max(round(wished * total), least), max(most, 1))
    return wished if count == round(wished * total) else round(count / total, 6)


def _split_sizes(data: DataConfig, seen: Survey) -> dict[str, int]:
    """Return the images of each split; raises `UserError` where the splits cannot be drawn."""
    from cnn_tuning.data.splits import assign

    return {split: len(chosen) for split, (_, chosen) in assign(seen.labels, seen.classes, data, 0).items()}


def _plain(data: DataConfig) -> dict[str, Any]:
    """Return what differs from `conf/data/image_folder.yaml`, as plain values."""
    (source,) = data.sources
    place: dict[str, Any] = {"uri": source.uri}
    if source.uri.startswith("s3:"):
        place["unsigned"] = source.unsigned
    files = {name: {"sha256": f.sha256, "bytes": f.bytes} for name, f in data.files.items()}
    size = {
        "size": list(data.image.size),
        "channels": data.image.channels,
        "interpolation": data.image.interpolation,
    }
    fractions = {"val_fraction": data.val_fraction, "test_fraction": data.test_fraction}
    return {
        "name": data.name,
        **({"files": files} if files else {}),
        "sources": [place],
        "image": size,
        **fractions,
    }


def _write_checked(target: Path, text: str, name: str) -> None:
    """Write the experiment; one that does not compose is taken back."""
    before = target.read_text(encoding="utf-8") if target.exists() else None
    target.write_text(text, encoding="utf-8")
    try:
        config.compose([f"experiment={name}"], params=None)
    except UserError:
        target.unlink() if before is None else target.write_text(before, encoding="utf-8")
        raise
