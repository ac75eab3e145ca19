"""`cnn-tuning init`: a folder, an archive or an S3 prefix of one's own pictures becomes an experiment."""

import json
import shutil
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from project import ROOT

from cnn_tuning.cli import cli
from cnn_tuning.config import compose
from cnn_tuning.data.formats import read
from cnn_tuning.data.prepare import prepare
from cnn_tuning.data.sources import fetch
from cnn_tuning.data.stand_in import draw
from cnn_tuning.errors import UserError

SUFFIXES = ("jpg", "png", "webp", "gif", "bmp", "tif")


def photos(root, counts, size=(48, 40), mode="RGB", splits=("",)):
    """Pictures of mixed formats in class folders, below a folder for each split where there are some."""
    rng = np.random.default_rng(0)
    for split in splits:
        for label, (name, count) in enumerate(counts.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(draw(3 * label, 12, size, rng)).convert(mode)
                image.save(folder / f"{i:03}.{SUFFIXES[i % len(SUFFIXES)]}")
    return root


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the library of options, entered."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments):
    """Run the command; give what it printed, or raise what it raised."""
    done = CliRunner().invoke(cli, ["init", *map(str, arguments)], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output


def sheet(project, name):
    return json.loads((project / "scratch/init" / name / "sheet.json").read_text())


def test_a_folder_becomes_an_experiment_that_runs(project):
    photos(project / "My photos", {"a": 30, "b": 30, "c": 12})
    (project / "My photos/a/broken.jpg").write_bytes(b"no picture")
    printed = init("My photos")
    assert "dvc exp run -S experiment=my_photos" in printed and "1 unreadable" in printed
    config = compose(["experiment=my_photos"], params=None)
    assert config.data.name == "my_photos" and config.data.image.channels == 3
    fetch(config.data, project / "raw", cache=project / "cache")
    meta = prepare(config.data, project / "raw", project / "out", seed=0)
    assert meta.classes == ("a", "b", "c") and sum(map(sum, meta.counts.values())) == 72
    facts = sheet(project, "my_photos")
    assert facts["counts"] == {"train": {"a": 30, "b": 30, "c": 12}}
    assert facts["unreadable"] == [{"path": "a/broken.jpg", "reason": "not an image of a known format"}]
    assert set(facts["formats"]) == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}
    page = (project / "scratch/init/my_photos/sheet.html").read_text()
    assert "broken.jpg" in page and "72 readable pictures" in page


def test_near_duplicates_across_splits_are_each_listed(project):
    root = photos(project / "set", {"a": 8, "b": 8}, splits=("train", "valid", "test"))
    Image.open(root / "train/a/001.png").resize((30, 25)).save(root / "test/a/again.png")
    shutil.copy(root / "train/b/002.webp", root / "valid/a/moved.webp")
    shutil.copy(root / "train/b/001.png", root / "train/b/twice.png")
    printed = init("set")
    assert "2 near-duplicates across splits" in printed and "two classes" in printed
    found = sheet(project, "set")["near_duplicates"]
    assert [(set(p["paths"]), set(p["splits"])) for p in found["across"]] == [
        ({"train/a/001.png", "test/a/again.png"}, {"train", "test"}),
        ({"train/b/002.webp", "valid/a/moved.webp"}, {"train", "val"}),
    ]
    assert [p["paths"] for p in found["within"]] == [["train/b/001.png", "train/b/twice.png"]]


def test_imbalance_is_told(project):
    photos(project / "set", {"many": 60, "few": 5}, size=(24, 24))
    assert "imbalance: many has 60 training pictures, few 5" in init("set")


@pytest.mark.parametrize(
    ("size", "mode", "model", "side", "channels"),
    [
        ((12, 12), "RGB", "compact_cnn_small", 8, 3),
        ((30, 28), "L", "compact_cnn", 28, 1),
        ((70, 65), "RGB", "resnet9", 64, 3),
        ((200, 160), "RGB", "efficientnet_lite0", 224, 3),
        ((200, 160), "L", "resnet9", 64, 1),
    ],
)
def test_size_and_network_suit_the_pictures(project, size, mode, model, side, channels):
    photos(project / "set", {"a": 6, "b": 6}, size=size, mode=mode)
    for path in [p for p in (project / "set").rglob("*") if p.suffix in (".gif", ".webp")]:
        path.unlink()  # these keep no grey
    init("set", "--name", "mine")
    config = compose(["experiment=mine"], params=None)
    assert (config.model.name, config.data.image.size, config.data.image.channels) == (
        model,
        (side, side),
        channels,
    )


@pytest.mark.parametrize("counts", [{"a": 3, "b": 3}, {"a": 4, "b": 40}, {str(i): 3 for i in range(20)}])
def test_small_folders_have_every_class_in_every_split(project, counts):
    photos(project / "set", counts, size=(16, 16))
    init("set")
    config = compose(["experiment=set"], params=None)
    fetch(config.data, project / "raw", cache=project / "cache")
    meta = prepare(config.data, project / "raw", project / "out", seed=0)
    assert all(min(numbers) >= 1 for numbers in meta.counts.values())


def test_an_archive_becomes_an_experiment(project):
    root = photos(project / "set", {"a": 6, "b": 6})
    (project / "pictures").mkdir()
    with zipfile.ZipFile(project / "pictures/flowers.zip", "w") as archive:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            archive.write(path, f"flowers/{path.relative_to(root)}")
    init("pictures/flowers.zip")
    config = compose(["experiment=flowers"], params=None)
    assert len(config.data.files["flowers.zip"].sha256) == 64
    fetch(config.data, project / "raw", cache=project / "cache")
    with read(config.data, project / "raw") as raw:
        assert raw.classes == ("a", "b") and len(raw.splits["train"]) == 12


MISTAKES = {
    "missing": (["nowhere"], "no such folder"),
    "a file": (["conf/config.yaml"], "neither a folder nor"),
    "no classes": (["empty"], "no class folders"),
    "one class": (["one"], "at least 2"),
    "too few": (["few"], "too few images"),
    "all broken": (["broken"], "none of 2 pictures can be read"),
    "name of a data set": (["few", "--name", "mnist"], "conf/data"),
    "odd name": (["few", "--name", "9/x"], "no name for an experiment"),
    "there already": (["few", "--name", "digits"], "conf/data"),
    "experiment there already": (["few", "--name", "smoke"], "exists"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_leave_no_experiment(project, name):
    (project / "empty").mkdir()
    photos(project / "one", {"a": 5})
    photos(project / "few", {"a": 5, "b": 1})
    for label in "ab":
        (project / "broken" / label).mkdir(parents=True)
        (project / "broken" / label / "x.jpg").write_bytes(b"no")
    before = sorted((project / "conf/experiment").iterdir())
    arguments, words = MISTAKES[name]
    with pytest.raises(UserError, match=words) as caught:
        init(*arguments)
    assert "\n" not in str(caught.value)
    assert sorted((project / "conf/experiment").iterdir()) == before


def test_force_replaces(project):
    photos(project / "set", {"a": 6, "b": 6})
    init("set")
    with pytest.raises(UserError, match="--force"):
        init("set")
    init("set", "--size", "24", "--force")
    assert compose(["experiment=set"], params=None).data.image.size == (24, 24)
