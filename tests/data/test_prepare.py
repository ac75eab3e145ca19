"""Preprocessing: splits, bytes, statistics, workers, policies."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cnn_tuning.config import DataConfig, FileConfig, ImageConfig
from cnn_tuning.data.convert import Chunk, ImageFile, convert_all
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.errors import UserError


def configured(**changes):
    values = {
        "name": "made",
        "format": "image_folder",
        "files": {},
        "sources": (),
        "image": ImageConfig((12, 10), 3),
    }
    return DataConfig(**(values | changes))


def folder(root, counts, seed=0, start=0):
    """Noisy pictures of several sizes, `counts` of each class."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + count):
            pixels = rng.integers(0, 256, (8 + i % 9, 10 + i % 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:04}.png")
    return root


def arrays(root, count=500, shape=(12, 10), classes=5, test=100, seed=0):
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    parts = {}
    for name, size in (("train", count), ("test", test)):
        if size:
            parts[f"x_{name}"] = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
            parts[f"y_{name}"] = rng.permutation(np.arange(size) % classes)
    np.savez(root / "a.npz", **parts)
    return parts


NPZ = {"format": "npz", "files": {"a.npz": FileConfig()}, "image": ImageConfig((12, 10), 1)}


def contents(out: Path):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_arrays_are_packed_as_they_are(tmp_path):
    parts = arrays(tmp_path / "raw")
    meta = prepare(configured(**NPZ, val_samples=50), tmp_path / "raw", tmp_path / "out", seed=1)
    data = PackedData.open(tmp_path / "out")
    assert data.meta == meta and meta.shape == (1, 12, 10) and meta.bytes == 600 * 120
    assert meta.counts == {"train": (90,) * 5, "val": (10,) * 5, "test": (20,) * 5}
    train, val, test = (data.split(name) for name in ("train", "val", "test"))
    assert np.array_equal(test.images[:, 0], parts["x_test"]) and np.array_equal(test.labels, parts["y_test"])
    both = np.concatenate([train.images, val.images])[:, 0]
    assert sorted(map(bytes, both)) == sorted(map(bytes, parts["x_train"])), "each image once, none invented"
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    with pytest.raises(ValueError):
        train.images[0] = 0
    scaled = train.images / 255
    assert np.allclose(meta.mean, scaled.mean(axis=(0, 2, 3)), rtol=0, atol=1e-12)
    assert np.allclose(meta.std, scaled.std(axis=(0, 2, 3)), rtol=0, atol=1e-12)
    assert (tmp_path / "out" / "rejected.csv").read_text() == "path,reason\n"
    for name in ("train", "val", "test"):
        data.verify(name)


def test_the_seed_alone_draws_the_validation_split(tmp_path):
    arrays(tmp_path / "raw")

    def made(seed):
        prepare(configured(**NPZ), tmp_path / "raw", tmp_path / "out", seed=seed)
        return contents(tmp_path / "out")

    first = made(1)
    assert first == made(1)
    other = made(2)
    assert first["val/images.npy"] != other["val/images.npy"]
    assert first["test/images.npy"] == other["test/images.npy"], "the test split is not touched"
    digest = json.loads(first["meta.json"])["digests"]
    assert digest["test"] == json.loads(other["meta.json"])["digests"]["test"] != digest["train"]


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    raw = folder(tmp_path / "raw", {"a": 150, "b": 130, "c": 60})
    (raw / "a" / "0003.png").write_bytes(b"broken")
    made = []
    for workers in (1, 2, 3):
        prepare(configured(), raw, tmp_path / "out", seed=0, workers=workers)
        made.append(contents(tmp_path / "out"))
    assert made[0] == made[1] == made[2]
    assert b"a/0003.png,not an image" in made[0]["rejected.csv"]


def test_bad_images_leave_no_holes(tmp_path):
    raw = folder(tmp_path / "raw", {"a": 200, "b": 200})
    bad = [raw / name / f"{i:04}.png" for name in "ab" for i in range(0, 200, 7)]
    whole = prepare(configured(), raw, tmp_path / "whole", seed=0)
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    meta = prepare(configured(), raw, tmp_path / "out", seed=0)
    rows = (tmp_path / "out" / "rejected.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [str(p.relative_to(raw)) for p in sorted(bad)]
    assert sum(map(sum, meta.counts.values())) == 400 - len(bad)
    data, before = PackedData.open(tmp_path / "out"), PackedData.open(tmp_path / "whole")
    everything = {bytes(image) for name in whole.counts for image in before.split(name).images}
    for name in ("train", "val", "test"):
        data.verify(name)
        kept = data.split(name)
        assert len(kept.images) == len(kept.labels) and {bytes(image) for image in kept.images} <= everything
    scaled = data.split("train").images / 255
    assert np.allclose(meta.mean, scaled.mean(axis=(0, 2, 3))) and np.allclose(
        meta.std, scaled.std(axis=(0, 2, 3))
    )


def test_names_that_are_not_utf_8(tmp_path, capsys):
    """Their odd bytes are written as \\udc and two digits, good pictures and bad ones alike."""
    raw = folder(tmp_path / "raw", {"a": 20, "b": 20})
    shutil.copy(raw / "a" / "0001.png", os.fsencode(raw / "a") + b"/caf\xe9.png")
    Path(os.fsdecode(os.fsencode(raw / "b") + b"/na\xefve.png")).write_bytes(b"broken")
    meta = prepare(configured(), raw, tmp_path / "out", seed=0)
    assert sum(map(sum, meta.counts.values())) == 41
    rows = (tmp_path / "out" / "rejected.csv").read_text(encoding="utf-8").splitlines()
    assert rows[1:] == ["b/na\\udcefve.png,not an image of a known format"]
    assert "1 bad image left out" in capsys.readouterr().err


def test_policy_fail_lists_all_and_keeps_the_earlier_result(tmp_path):
    raw = folder(tmp_path / "raw", {"a": 20, "b": 20})
    prepare(configured(), raw, tmp_path / "out", seed=0)
    before = contents(tmp_path / "out")
    for name in ("a/0001.png", "b/0002.png"):
        (raw / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"2 bad images(.|\n)*a/0001.png: zero bytes(.|\n)*b/0002.png: zero bytes"):
        prepare(configured(bad_images="fail"), raw, tmp_path / "out", seed=0)
    assert contents(tmp_path / "out") == before and {p.name for p in tmp_path.iterdir()} == {"raw", "out"}


def test_folder_with_its_own_splits(tmp_path):
    for i, split in enumerate(("train", "valid", "test")):
        folder(tmp_path / "raw" / split, {"a": 6, "b": 4}, seed=i)
    meta = prepare(configured(), tmp_path / "raw", tmp_path / "out", seed=0)
    assert meta.counts == {"train": (6, 4), "val": (6, 4), "test": (6, 4)} and list(meta.sources) == ["images"]
    (tmp_path / "raw" / "test" / "a" / "0000.png").write_bytes((tmp_path / "raw/test/a/0001.png").read_bytes())
    again = prepare(configured(), tmp_path / "raw", tmp_path / "out", seed=0)
    assert again.sources != meta.sources and again.digest != meta.digest


def test_limit_thins_each_official_split(tmp_path):
    arrays(tmp_path / "raw")
    meta = prepare(configured(**NPZ, limit=60, val_fraction=0.25), tmp_path / "raw", tmp_path / "out", seed=0)
    assert meta.counts == {"train": (9,) * 5, "val": (3,) * 5, "test": (12,) * 5}


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_arrays_of_another_size_are_resized_like_any_picture(tmp_path, resize):
    from cnn_tuning.data.images import to_input

    parts = arrays(tmp_path / "raw", count=300, shape=(7, 9, 3))
    image = ImageConfig((12, 10), 1, resize)
    prepare(configured(**(NPZ | {"image": image})), tmp_path / "raw", tmp_path / "out", seed=0, workers=2)
    test = PackedData.open(tmp_path / "out").split("test")
    assert all(np.array_equal(test.images[i], to_input(parts["x_test"][i], image)) for i in range(100))


def test_flat_images_have_a_usable_deviation(tmp_path):
    (tmp_path / "raw").mkdir()
    np.savez(tmp_path / "raw" / "a.npz", x=np.full((40, 12, 10), 7, np.uint8), y=np.arange(40) % 2)
    meta = prepare(configured(**NPZ), tmp_path / "raw", tmp_path / "out", seed=0)
    assert meta.mean == (7 / 255,) and meta.std == (1 / 255,)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    arrays(tmp_path / "raw")
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, NotADirectoryError), match="file"):
        prepare(configured(**NPZ), tmp_path / "raw", tmp_path / "file" / "out", seed=0)


def test_no_worker_outlives_a_killed_parent(tmp_path):
    raw = folder(tmp_path / "raw", {"a": 2, "b": 2})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    picture.save(tmp_path / "big.png")
    for i in range(600):
        os.link(tmp_path / "big.png", raw / "ab"[i % 2] / f"big{i}.png")
    program = (
        "import sys, pickle\nfrom pathlib import Path\nfrom cnn_tuning.data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(pickle.load(sys.stdin.buffer), Path(sys.argv[1]), Path(sys.argv[2]), seed=0, workers=2)\n"
    )
    (tmp_path / "go.py").write_text(program)
    import pickle

    process = subprocess.Popen([sys.executable, tmp_path / "go.py", raw, tmp_path / "out"], stdin=subprocess.PIPE)
    process.stdin.write(pickle.dumps(configured()))
    process.stdin.close()
    children = []
    deadline = time.monotonic() + 20
    while len(children) < 4 and time.monotonic() < deadline:  # fork server, resource tracker, two workers
        time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 4 and process.poll() is None
    process.send_signal(signal.SIGKILL)
    # Not waited for yet: to its workers a dead parent is gone, also while it is still listed.
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == [] and not (tmp_path / "out").exists()
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.wait()


def test_workers_that_cannot_start_are_not_called_killed(tmp_path):
    """Without the usual guard a script is run again by its own workers, which end with an error."""
    raw = folder(tmp_path / "raw", {"a": 150, "b": 150})
    (tmp_path / "go.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom cnn_tuning.config import DataConfig, ImageConfig\n"
        "from cnn_tuning.data.prepare import prepare\nfrom cnn_tuning.errors import UserError\n"
        "config = DataConfig('made', 'image_folder', {}, (), ImageConfig((8, 8), 3))\n"
        "out = Path(sys.argv[2]) / __name__\n"
        "try:\n    prepare(config, Path(sys.argv[1]), out, seed=0, workers=2)\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "go.py", raw, tmp_path], capture_output=True, text=True)
    assert "RuntimeError" in done.stderr, "the worker says why"
    assert "could not start" in done.stdout and "killed" not in done.stdout


class Deadly:
    """Ends the process that unpickles it, as the kernel does when memory runs out."""

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


def test_a_killed_worker_is_called_killed(tmp_path):
    target = ImageFile(tmp_path / "images.npy", 8, ImageConfig((4, 4), 1))
    target.create()
    good = [Chunk("train", i, np.zeros((1, 6, 6), np.uint8), tmp_path, target) for i in range(8)]
    with pytest.raises(UserError, match="was killed"):
        list(convert_all(iter([*good, Deadly()]), 2))
    assert len(list(convert_all(iter(good), 2))) == 8


def test_a_test_split_may_lack_a_class(tmp_path):
    folder(tmp_path / "raw" / "train", {"a": 20, "b": 20})
    folder(tmp_path / "raw" / "test", {"a": 5})
    meta = prepare(configured(), tmp_path / "raw", tmp_path / "out", seed=0)
    assert meta.counts["test"] == (5, 0)


def test_meta_survives_its_file(tmp_path):
    arrays(tmp_path / "raw")
    meta = prepare(configured(**NPZ), tmp_path / "raw", tmp_path / "out", seed=0)
    read = PackedData.open(tmp_path / "out").meta
    assert read == meta and read.digest == meta.digest and len(meta.digest) <= 36
    assert dataclasses.replace(meta, seed=1).digest != meta.digest
