"""What reads files of others: IDX, CIFAR, CSV, NPZ, archives, pictures, bundles, prepared data's meta, YAML.

Each is a `Target`: a damaged input gives a valid result or `UserError`, and nothing else.
"""

from __future__ import annotations

import atexit
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from mutations import Target, damaged, harmless, one_line

from cnn_tuning.config import CsvConfig, DataConfig, FileConfig, ImageConfig
from cnn_tuning.data.archives import extract
from cnn_tuning.data.formats import read
from cnn_tuning.data.images import BadImage, to_input
from cnn_tuning.errors import UserError

_counter = itertools.count()
RANDOM = np.random.default_rng(0)
IMAGES, LABELS = RANDOM.integers(0, 256, (6, 6, 6), np.uint8), np.arange(6) % 3
RECORDS = np.hstack([LABELS[:, None].astype(np.uint8), RANDOM.integers(0, 4, (6, 3072), np.uint8)])
CSV = "\n".join(",".join(map(str, [y, *x.ravel()])) for x, y in zip(IMAGES, LABELS, strict=True)).encode() + b"\n"


@functools.cache
def _top() -> Path:
    top = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    return top


@contextmanager
def _folder() -> Iterator[Path]:
    """Give a new folder, which is gone afterwards."""
    folder = _top() / str(next(_counter))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def _pickled(protocol: int) -> bytes:
    data = np.ascontiguousarray(RECORDS[:, 1:])
    return pickle.dumps({b"data": data, b"labels": RECORDS[:, 0].tolist(), b"batch_label": b"x"}, protocol)


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x_train=IMAGES, y_train=LABELS)
    return buffer.getvalue()


# --- arrays ----------------------------------------------------------------------------------------------

# The files of a whole data set; what is fuzzed is the first, in each of its forms.
ARRAYS: dict[str, tuple[dict[str, Any], dict[str, bytes], list[bytes]]] = {
    "idx": (
        {},
        {"images": b"", "labels": _idx(LABELS.astype(np.uint8))},
        [_idx(IMAGES), gzip.compress(_idx(IMAGES), mtime=0), _idx(IMAGES[..., None])],
    ),
    "cifar_binary": (
        {"files": {}},
        {"data_batch_1.bin": b"", "test_batch.bin": RECORDS.tobytes()},
        [RECORDS.tobytes()],
    ),
    "cifar_python": (
        {"files": {}},
        {"data_batch_1": b"", "test_batch": _pickled(2)},
        [_pickled(protocol) for protocol in range(6)],
    ),
    "csv": ({"csv": CsvConfig(label="first", white=255)}, {"train.csv": b""}, [CSV, gzip.compress(CSV, mtime=0)]),
    "npz": ({}, {"all.npz": b""}, [_npz()]),
}  # fmt: skip


def _read_arrays(name: str, data: bytes) -> None:
    changes, files, _ = ARRAYS[name]
    with _folder() as folder:
        for file, content in files.items():
            (folder / file).write_bytes(content or data)
        values = {"files": {file: FileConfig() for file in files}, **changes}
        config = DataConfig(name="made", format=name, sources=(), image=ImageConfig((6, 6), 1), **values)
        with harmless(folder):
            try:
                with read(config, folder, work=folder) as got:
                    split = got.splits["train"]
                    assert len(split.images) == len(split.labels) > 0
                    assert np.asarray(split.images).dtype == np.uint8
                    assert split.labels.min() >= 0 and split.labels.max() < len(got.classes)
            except UserError as error:
                one_line(error)


# Opcodes and names for a pickle that is made to run something.
_NAMES = [
    *(b"os\nsystem", b"posix\nsystem", b"builtins\neval", b"builtins\nopen", b"subprocess\nPopen"),
    *(b"numpy\nndarray", b"numpy\ndtype", b"numpy.core.multiarray\n_reconstruct", b"_codecs\nencode"),
    *(b"numpy\nsave", b"numpy.core.multiarray\n__builtins__.eval", b"builtins\ngetattr", b"numpy\nmemmap"),
]
_STEPS = [
    *(b"(", b"t", b"R", b"b", b"d", b"l", b"s", b"u", b"a", b"e", b"0", b"2", b"N", b"]", b"}", b")"),
    *(b"\x81", b"\x85", b"S'id'\n", b"I1\n", b"I99999999999\n", b"K\x05", b"C\x01x", b"V\xc3\n"),
    *(b"p0\n", b"g0\n", b"h\x00", b"q\x00"),
]  # fmt: skip


def _programs() -> st.SearchStrategy[bytes]:
    call = st.sampled_from(_NAMES).map(lambda name: b"c" + name + b"\n")
    stacked = st.sampled_from(_NAMES).map(
        lambda name: b"".join(b"\x8c" + bytes([len(part)]) + part for part in name.split(b"\n")) + b"\x93"
    )
    step = st.one_of(st.sampled_from(_STEPS), call, stacked)
    return st.lists(step, max_size=30).map(lambda steps: b"\x80\x04" + b"".join(steps) + b".")


def _arrays_target(name: str, examples: int) -> Target:
    inputs = damaged(ARRAYS[name][2])
    if name == "cifar_python":
        inputs = st.one_of(inputs, _programs())
    return Target(name, inputs, functools.partial(_read_arrays, name), examples)


# --- archives --------------------------------------------------------------------------------------------

MEMBERS = {"a/one.png": b"1" * 40, "a/two.txt": b"22", "../out": b"3", "b/": b""}


def _zip(compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in MEMBERS.items():
            if ".." not in name:
                archive.writestr(name, data)
    return buffer.getvalue()


def _tar(mode: str, form: int, *, evil: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:
        for name, data in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if evil or ".." not in name:
                archive.addfile(info, io.BytesIO(data))
        if evil:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            archive.addfile(info)
    return buffer.getvalue()


ARCHIVES = [
    *(_zip(kind) for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    *(_tar("w", form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
    *(_tar(f"w:{kind}", tarfile.PAX_FORMAT) for kind in ("gz", "bz2", "xz")),
    _tar("w", tarfile.GNU_FORMAT, evil=True),
]


def _extract(data: bytes) -> None:
    with _folder() as folder:
        (folder / "inside").mkdir()
        (folder / "canary").write_text("alive")
        archive = folder / "inside/a.bin"
        archive.write_bytes(data)
        with harmless(folder / "inside"):
            try:
                extract(archive, folder / "inside/out", max_bytes=1 << 20, max_files=100)
            except UserError as error:
                one_line(error)
                assert list((folder / "inside").iterdir()) == [archive], "a refused archive left something"
            else:
                for path in (folder / "inside/out").rglob("*"):
                    assert not path.is_symlink() and (path.is_file() or path.is_dir()), path
        assert sorted(path.name for path in folder.iterdir()) == ["canary", "inside"]
        assert (folder / "canary").read_text() == "alive"


# --- pictures --------------------------------------------------------------------------------------------


@functools.cache
def _pictures() -> list[bytes]:
    from PIL import Image

    rgb = Image.fromarray(RANDOM.integers(0, 256, (20, 24, 3), np.uint8))
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((rgb, kind, {}) for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "AVIF")),
        *((rgb, kind, {}) for kind in ("PPM", "JPEG2000", "PCX")),
        *((rgb, "TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
        (rgb, "JPEG", {"progressive": True, "exif": _turned()}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb.convert("RGBA"), "PNG", {}),
        (rgb.convert("P"), "PNG", {"transparency": 3}),
        (rgb.convert("L").convert("I;16"), "PNG", {}),
        (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (rgb.convert("F"), "TIFF", {}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
    ]  # fmt: skip
    whole = []
    for image, kind, options in made:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        whole.append(buffer.getvalue())
    return whole


def _turned() -> Any:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


_SHAPES = (ImageConfig((8, 8), 1), ImageConfig((8, 8), 3), ImageConfig((16, 12), 3))


def _decode(data: bytes) -> None:
    for config in _SHAPES[:: 1 + len(data) % 2]:
        with harmless():
            try:
                got = to_input(data, config, max_pixels=1_000_000)
                assert got.dtype == np.uint8 and got.shape == (config.channels, *config.size)
            except BadImage as error:
                one_line(error)


# --- bundles and prepared data ---------------------------------------------------------------------------


@functools.cache
def _bundle() -> tuple[bytes, bytes]:
    from cnn_tuning.config import ModelConfig
    from cnn_tuning.models import bundle

    name = "compact_cnn"
    specification = bundle.Specification(
        data_name="made",
        model=ModelConfig(name=name, architecture=name, dropout="none", conv_dropout=0.0, dense_dropout=0.0),
        classes=("a", "b"),
        image=ImageConfig((28, 28), 1),
        mean=(0.1,),
        std=(0.3,),
    )
    with _folder() as folder:
        bundle.save(folder, specification.build(), specification)
        return (folder / bundle.MODEL).read_bytes(), (folder / bundle.WEIGHTS).read_bytes()


def _load_bundle(data: tuple[str, bytes]) -> None:
    """Load damaged weights whose digest was made to fit, or a damaged description."""
    from cnn_tuning.models import bundle

    kind, content = data
    description, weights = _bundle()
    with _folder() as folder:
        if kind == "weights":
            weights = content
            tree = json.loads(description) | {"weights_sha256": hashlib.sha256(content).hexdigest()}
            description = json.dumps(tree).encode()
        else:
            description = content
        (folder / bundle.MODEL).write_bytes(description)
        (folder / bundle.WEIGHTS).write_bytes(weights)
        with harmless(folder):
            try:
                bundle.load(folder)
            except UserError as error:
                _lines(error)


@functools.cache
def _weights() -> list[tuple[str, bytes]]:
    import torch

    tensors = {"conv.weight": torch.zeros(2, 1, 3, 3), "bias": torch.ones(2)}
    whole = [("a.safetensors", _bundle()[1])]
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"state_dict": tensors}, buffer, _use_new_zipfile_serialization=zipped)
        whole.append(("a.pth", buffer.getvalue()))
    return whole


def _read_weights(data: tuple[str, bytes]) -> None:
    from cnn_tuning.models.weights import read_tensors

    with _folder() as folder:
        (folder / data[0]).write_bytes(data[1])
        with harmless(folder):
            try:
                read_tensors(folder / data[0])
            except UserError as error:
                one_line(error)


META = {
    "name": "made", "classes": ["a", "b"], "mean": [0.1], "std": [0.3], "bytes": 100, "seed": 0,
    "image": {"size": [8, 8], "channels": 1, "resize": "pad", "interpolation": "bilinear", "background": 0},
    "counts": {"train": [1, 2], "val": [1, 1], "test": [1, 1]}, "sources": {"x": "0"}, "digests": {"train": "0"},
}  # fmt: skip


def _open_meta(data: bytes) -> None:
    from cnn_tuning.data.packed import PackedData

    with _folder() as folder:
        (folder / "meta.json").write_bytes(data)
        with harmless(folder):
            try:
                PackedData.open(folder)
            except UserError as error:
                _lines(error)


# --- YAML ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def _laughs(depth: int, width: int) -> bytes:
    names = [f"k{n}" for n in range(depth)]
    lines = [f"{names[0]}: &{names[0]} [{', '.join(['x'] * width)}]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * width)}]" for a, b in itertools.pairwise(names)]
    return ("experiment: digits\n" + "\n".join(lines) + "\n").encode()


PARAMS = [
    (ROOT / "params.yaml").read_bytes(),
    b"experiment: digits\nseed: 3\nmodel: {dropout: dense}\ntrainer:\n  max_epochs: 3\n  batch_size: 32\n",
    b"experiment: smoke\nsearch: {budget: {trials: 2}, space: {model.dropout: {kind: float, low: 1e-3}}}\n",
    b"ablation: [dropout, batch_size]\ndata: {sources: [{uri: 'file:/x', unsigned: false}]}\n",
    b"experiment: ${oc.env:HOME}\nseed: !!python/object/apply:os.system ['id']\n",
    b"experiment: digits\nseed: ${oc.decode:1}\ntrainer: &t {max_epochs: ${seed}}\nmodel: *t\n",
    _laughs(8, 9),
]
_YAML = st.one_of(
    damaged(PARAMS),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["model", "data", "seed", "trainer", "name", "search", "space", "ablation", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=10,
    ).map(lambda tree: json.dumps(tree).encode()),
)


def _lines(error: UserError) -> None:
    """Check a refusal that may list several mistakes, one a line."""
    assert str(error).strip()
    for line in filter(None, (part.strip() for part in str(error).splitlines())):
        one_line(ValueError(line))


def _read_params(data: bytes) -> None:
    """Read the file that a person edits, as far as that goes without composing (which takes a second)."""
    from cnn_tuning.config.values import read_params, split

    with _folder() as folder:
        (folder / "params.yaml").write_bytes(data)
        with harmless(folder):
            try:
                split(read_params(folder / "params.yaml"), ROOT / "conf", {}, [])
            except UserError as error:
                _lines(error)


def _compose(data: bytes) -> None:
    from cnn_tuning.config import compose

    with _folder() as folder:
        (folder / "params.yaml").write_bytes(data)
        with harmless(folder):
            try:
                compose([], params=folder / "params.yaml", conf=ROOT / "conf")
            except UserError as error:
                _lines(error)


LOCK = b"""\
seed: 0
tracking: {name: local, experiment: e, uri: null, on_unreachable: spool, spool: .state/spool, wait_s: 60.0,
  system_metrics_every_s: 1.0, price_per_hour: 0.0}
registry: {name: default, model: m, alias: champion, significance: 0.05, minimum_gain: 0.0, barred: null}
"""


def _load_lock(data: bytes) -> None:
    from cnn_tuning.config import load_locked
    from cnn_tuning.stages.registering import EvaluateConfig

    with _folder() as folder:
        (folder / "params.lock.yaml").write_bytes(data)
        with harmless(folder):
            try:
                load_locked(EvaluateConfig, folder / "params.lock.yaml")
            except UserError as error:
                _lines(error)


def targets() -> list[Target]:
    """Return all of them; the models that pictures and bundles need are made here."""
    description, weights = _bundle()
    parts = [(b"model", [description]), (b"weights", [weights])]
    named = {name: [data for other, data in _weights() if other == name] for name, _ in _weights()}
    weights_of_others = st.one_of(
        *(st.tuples(st.just(name), damaged(whole)) for name, whole in named.items()),
        st.tuples(st.just("a.pth"), _programs()),
    )
    bundles = st.one_of(*(st.tuples(st.just(kind.decode()), damaged(whole)) for kind, whole in parts))
    return [
        *(_arrays_target(name, examples) for name, examples in
          (("idx", 60), ("cifar_binary", 20), ("cifar_python", 120), ("csv", 40), ("npz", 40))),
        Target("archives", damaged(ARCHIVES), _extract, 80),
        Target("pictures", damaged(_pictures()), _decode, 200),
        Target("bundles", bundles, _load_bundle, 40),
        Target("weights", weights_of_others, _read_weights, 40),
        Target("prepared data", damaged([json.dumps(META).encode()]), _open_meta, 60),
        Target("params.yaml", _YAML, _read_params, 60),
        Target("params.lock.yaml", damaged([LOCK, _laughs(8, 9)]), _load_lock, 60),
    ]  # fmt: skip


def slow_targets() -> list[Target]:
    """Return those whose every input takes a second."""
    return [Target("composition", _YAML, _compose, 3)]
