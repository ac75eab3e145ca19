"""Stand-ins have the layout, counts and file kinds of the real archives, say so, and run through the real path."""

import io
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from project import ROOT

from cnn_tuning.cli import cli
from cnn_tuning.config import DataConfig, compose, validate
from cnn_tuning.data import breeds, stand_in
from cnn_tuning.data.formats import read
from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.prepare import prepare
from cnn_tuning.data.sources import fetch
from cnn_tuning.errors import UserError


def configured(name, **changes):
    tree = yaml.safe_load((ROOT / "conf/data" / f"{name}.yaml").read_text())
    return validate(DataConfig, tree | changes)


@pytest.fixture(scope="module")
def dogs(tmp_path_factory):
    """The smallest share of the dog breeds, in a folder of downloads."""
    folder = tmp_path_factory.mktemp("dogs") / "downloads"
    made = stand_in.make("dog_breeds", folder / "dogImages.zip", share=0.01)
    return folder, made


def test_whole_counts_are_those_of_the_set():
    counts = breeds.counts()
    assert {split: int(n.sum()) for split, n in counts.items()} == {"train": 6680, "valid": 835, "test": 836}
    assert configured("dog_breeds").counts == {"train": 6680, "val": 835, "test": 836}
    assert len(set(breeds.BREEDS)) == 133 and breeds.folders()[4] == "005.Alaskan_malamute"
    train = dict(zip(breeds.BREEDS, counts["train"].tolist(), strict=True))
    largest = sorted(train.values(), reverse=True)
    assert largest[:10] == sorted(breeds.LARGEST.values(), reverse=True) and largest[10] < 66
    assert {breed: train[breed] for breed in breeds.LARGEST} == breeds.LARGEST
    assert min(int(n.min()) for n in counts.values()) >= 3


def test_layout_and_file_kinds(dogs):
    folder, made = dogs
    with zipfile.ZipFile(folder / "dogImages.zip") as archive:
        names = archive.namelist()
        images = [Image.open(io.BytesIO(archive.read(name))) for name in names[::40]]
    assert Counter(name.split("/")[1] for name in names) == {
        "train": made["train"], "valid": made["val"], "test": made["test"],
    }  # fmt: skip
    assert {name.split("/")[2] for name in names} == set(breeds.folders())
    assert names[0] == "dogImages/train/001.Affenpinscher/Affenpinscher_00001.jpg"
    assert {image.format for image in images} == {"JPEG"} and len({image.size for image in images}) > 4


def test_dog_breeds_from_archive_to_inputs(dogs, tmp_path):
    folder, made = dogs
    config = configured("dog_breeds", sources=[{"uri": f"file:{folder}/"}], counts=made)
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    meta = prepare(config, tmp_path / "raw", tmp_path / "out", seed=0, workers=1)
    assert meta.classes == breeds.folders() and {s: sum(n) for s, n in meta.counts.items()} == made
    train = PackedData.open(tmp_path / "out").split("train")
    assert train.images[0].size == 240 * 240 * 3 == 172_800
    assert not any(meta.digests[a] == meta.digests[b] for a, b in [("train", "val"), ("val", "test")])


def test_another_count_is_one_error_before_anything_is_decoded(dogs, tmp_path, monkeypatch):
    folder, made = dogs
    config = configured("dog_breeds", sources=[{"uri": f"file:{folder}/"}])
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    monkeypatch.setattr("cnn_tuning.data.prepare.convert_all", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError) as caught:
        prepare(config, tmp_path / "raw", tmp_path / "out", seed=0)
    text = str(caught.value)
    assert (
        "\n" not in text and f"{made['train']:,} train images instead of 6,680" in text and "data.counts" in text
    )


@pytest.mark.parametrize("name", [pytest.param("dog_breeds", marks=pytest.mark.slow), "cifar10", "cifar10_python"])
def test_equal_arguments_give_equal_bytes_and_a_mark(name, tmp_path):
    for out in ("a", "b"):
        stand_in.make(name, tmp_path / out, share=0.002, workers=1)
    stand_in.make(name, tmp_path / "c", share=0.002, seed=1, workers=1)
    a, b, c = ((tmp_path / out).read_bytes() for out in "abc")
    assert a == b != c
    assert stand_in.is_stand_in(tmp_path / "a")


def test_real_archives_are_no_stand_ins(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/b.jpg", b"x")
    (tmp_path / "b.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    assert not any(stand_in.is_stand_in(tmp_path / name) for name in ("a.zip", "b.gz", "missing"))


@pytest.mark.parametrize(("name", "share", "words"), [("mnist", 1, "dog_breeds"), ("cifar10", 0, "share")])
def test_what_cannot_be_made(name, share, words, tmp_path):
    with pytest.raises(UserError, match=words):
        stand_in.make(name, tmp_path / "a", share=share)


@pytest.mark.parametrize("name", ["cifar10", "cifar10_python"])
def test_cifar10_in_the_official_format(name, tmp_path):
    (file,) = configured(name).files
    made = stand_in.make(name, tmp_path / file, share=0.005)
    assert made == {"train": 250, "test": 50}
    config = configured(name, files={file: {"md5": None}}, sources=[{"uri": f"file:{tmp_path}/"}])
    fetch(config, tmp_path / "raw", cache=tmp_path / "cache")
    with read(config, tmp_path / "raw") as raw:
        assert raw.splits["train"].images.shape == (250, 32, 32, 3)
        assert np.bincount(raw.splits["test"].labels).tolist() == [5] * 10
        # Nearest class mean of the training pictures' colours: far better than chance, so something can be learnt.
        colours = {s: d.images.reshape(len(d), -1).astype(float) for s, d in raw.splits.items()}
        labels = raw.splits["train"].labels
        means = np.stack([colours["train"][labels == k].mean(0) for k in range(10)])
        answers = ((colours["test"][:, None] - means) ** 2).sum(2).argmin(1)
        assert (answers == raw.splits["test"].labels).mean() > 0.3


def test_the_command_tells_how_to_use_it(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    arguments = ["stand-in", "cifar10", "--share", "0.002", "--out", "made/small.tar.gz"]
    printed = CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False).output
    settings = printed.split("params.yaml:\n")[1]
    (tmp_path / "params.yaml").write_text(f"experiment: cifar10\n{settings}")
    data = compose([]).data
    fetch(data, tmp_path / "raw", cache=tmp_path / "cache")
    meta = prepare(data, tmp_path / "raw", tmp_path / "out", seed=0)
    assert {split: sum(n) for split, n in meta.counts.items()} == {"train": 90, "val": 10, "test": 20}
