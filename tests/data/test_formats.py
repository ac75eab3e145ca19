"""Raw files of every format to arrays: round trips, truncation at any offset, refusals."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_tuning.config import CsvConfig, DataConfig, FileConfig, ImageConfig
from cnn_tuning.data.formats import read
from cnn_tuning.errors import UserError

SIDE = ImageConfig((6, 6), 1)


def configured(format, files, **changes):
    names = {name: FileConfig() for name in files}
    return DataConfig(
        **({"name": "made", "format": format, "files": names, "sources": (), "image": SIDE} | changes)
    )


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


IMAGES, LABELS = noise(12, 6, 6), np.arange(12) % 3
CSV = "\n".join(",".join(map(str, [y, *x.ravel()])) for x, y in zip(IMAGES, LABELS, strict=True)).encode() + b"\n"
RECORDS = np.hstack([LABELS[:, None].astype(np.uint8), noise(12, 3072, seed=1)])
CIFAR_PIXELS = RECORDS[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def cifar_pickle(records, protocol=2, labels=None):
    data = np.ascontiguousarray(records[:, 1:])
    labels = labels or records[:, 0].tolist()
    return pickle.dumps({b"data": data, b"labels": labels, b"batch_label": b"x"}, protocol)


def npz_of_digits():
    """An NPZ file whose array says that it has as many rows as a number of 5,000 digits."""
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",), }\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
    return buffer.getvalue()


def tarred(files, top, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def five(data):
    """Six batches in the official names: five to train, one to test."""
    return {f"data_batch_{i}": data for i in range(1, 6)} | {"test_batch": data}


IDX = {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS.astype(np.uint8))}
FORMS = {
    "idx": ("idx", IDX, {}),
    "idx gzip": ("idx", {f"{n}.gz": gzip.compress(d) for n, d in IDX.items()}, {}),
    "csv": ("csv", {"all.csv": CSV}, {}),
    "csv gzip": ("csv", {"all.csv.gz": gzip.compress(CSV)}, {}),
    "csv header": ("csv", {"all.csv": b"label,pixels\n" + CSV}, {"csv": CsvConfig(header_lines=1)}),
    "npz": ("npz", {"all.npz": npz(x_train=IMAGES, y_train=LABELS)}, {}),
    "npz words": ("npz", {"all.npz": npz(images=IMAGES, labels=LABELS[:, None])}, {}),
    "npz one-hot": ("npz", {"all.npz": npz(train_images=IMAGES, train_labels=np.eye(3)[LABELS])}, {}),
    "npz floats": ("npz", {"all.npz": npz(x=IMAGES / np.float32(255), y=LABELS)}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_array_formats_round_trip(tmp_path, form):
    format, files, changes = FORMS[form]
    with read(configured(format, files, **changes), write(tmp_path / "raw", files)) as data:
        assert (
            data.classes == ("0", "1", "2") and set(data.splits) == {"train"} and len(data.digests) == len(files)
        )
        assert np.array_equal(data.splits["train"].images, IMAGES)
        assert np.array_equal(data.splits["train"].labels, LABELS)


CIFAR = {
    "binary files": ("cifar_binary", {f"{n}.bin": d for n, d in five(RECORDS.tobytes()).items()}),
    "binary archive": (
        "cifar_binary",
        {
            "cifar-10-binary.tar.gz": tarred(
                {f"{n}.bin": d for n, d in five(RECORDS.tobytes()).items()}, "cifar-10-batches-bin"
            )
        },
    ),
    "python archive": (
        "cifar_python",
        {"cifar-10-python.tar.gz": tarred(five(cifar_pickle(RECORDS)), "cifar-10-batches-py")},
    ),
    "python files": ("cifar_python", five(cifar_pickle(RECORDS, protocol=4))),
}


@pytest.mark.parametrize("form", CIFAR)
def test_cifar_has_five_training_batches_and_a_test_batch(tmp_path, form):
    format, files = CIFAR[form]
    raw = write(tmp_path / "raw", files)
    with read(configured(format, files), raw) as data:
        assert {name: len(split) for name, split in data.splits.items()} == {"train": 60, "test": 12}
        assert np.array_equal(data.splits["test"].images, CIFAR_PIXELS)
        assert np.array_equal(data.splits["train"].images[12:24], CIFAR_PIXELS)
    assert [p.name for p in tmp_path.iterdir()] == ["raw"], "what was unpacked is gone"


def test_the_pickle_form_of_python_2_reads(tmp_path):
    """The official batches were pickled by Python 2: protocol 2, byte strings, `numpy.core.multiarray`."""
    data = cifar_pickle(RECORDS).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in data
    with read(configured("cifar_python", five(data)), write(tmp_path / "raw", five(data))) as raw:
        assert np.array_equal(raw.splits["test"].images, CIFAR_PIXELS)


def test_splits_come_from_the_names(tmp_path):
    files = {"train.csv": CSV, "validation.csv": CSV[: CSV.index(b"\n") + 1], "test.csv": CSV}
    with read(configured("csv", files), write(tmp_path / "raw", files)) as data:
        assert {name: len(split) for name, split in data.splits.items()} == {"train": 12, "val": 1, "test": 12}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("mnist_test.csv", "test"),
        ("Fashion-MNIST Test.csv", "test"),
        ("testing1.csv", "test"),
        ("digits.valid.csv", "val"),
        ("x/validation.csv", "val"),
        ("val2.csv", "val"),
        ("training_set_test_site.csv", "train"),
        ("contest.csv", "train"),
        ("interval.csv", "train"),
        ("latest values.csv", "train"),
        ("constrained-test.csv", "test"),
    ],
)
def test_a_split_is_a_whole_word_of_the_name(tmp_path, name, split):
    (tmp_path / "raw" / name).parent.mkdir(parents=True)
    others = [f"{other}.csv" for other in ("train", "test") if other != split]
    one = CSV[: CSV.index(b"\n") + 1]
    files = {other: CSV if other == "train.csv" else one for other in others}
    files[name] = CSV if split == "train" else one
    with read(configured("csv", files), write(tmp_path / "raw", files)) as data:
        assert {name: len(found) for name, found in data.splits.items()} == {"train": 12, "test": 1, split: (
            12 if split == "train" else 1)}  # fmt: skip


def test_csv_white_is_scaled_to_255(tmp_path):
    files = {"a.csv": b"0,8,16,4,1\n16,16,16,16,0\n"}
    config = configured("csv", files, csv=CsvConfig("last", 16), image=ImageConfig((2, 2), 1))
    with read(config, write(tmp_path / "raw", files)) as data:
        assert data.splits["train"].images.tolist() == [[[0, 128], [255, 64]], [[255] * 2] * 2]
        assert data.splits["train"].labels.tolist() == [1, 0]


TRUNCATED = {k: v for k, v in FORMS.items() if k in ("idx", "idx gzip", "csv", "csv gzip", "npz")} | {
    "cifar_binary": ("cifar_binary", CIFAR["binary files"][1], {}),
    "cifar_python": ("cifar_python", five(cifar_pickle(RECORDS)), {}),
    "archive": ("cifar_binary", CIFAR["binary archive"][1], {}),
}


@pytest.mark.parametrize("form", TRUNCATED)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_truncation_at_any_offset_is_a_clear_error(tmp_path_factory, form, data):
    """All but a CSV, where a cut can leave whole lines or a shorter number, must notice."""
    format, files, changes = TRUNCATED[form]
    name = data.draw(st.sampled_from(sorted(files)))
    cut = data.draw(st.integers(0, len(files[name]) - 1))
    raw = write(tmp_path_factory.mktemp("cut") / "raw", files | {name: files[name][:cut]})
    try:
        with read(configured(format, files, **changes), raw) as read_back:
            assert form == "csv" or (format == "cifar_binary" and cut % 3073 == 0 and cut), (name, cut)
            assert len(read_back.splits["train"].images) > 0
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("form", ["idx", "csv", "npz", "cifar_python"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_never_give_another_error(tmp_path_factory, form, data):
    format, files, changes = TRUNCATED[form]
    name = data.draw(st.sampled_from(sorted(files)))
    damaged = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, min(len(damaged) - 1, 400)))] = data.draw(st.integers(0, 255))
    raw = write(tmp_path_factory.mktemp("bad") / "raw", files | {name: bytes(damaged)})
    try:
        with read(configured(format, files, **changes), raw):
            pass
    except UserError:
        pass


WRONG = {
    "labels missing": ("idx", {"train-images-idx3-ubyte": idx(IMAGES)}, {}, "one of labels"),
    "fewer labels": ("idx", IDX | {"train-labels-idx1-ubyte": idx(np.zeros(3, np.uint8))}, {}, "12 images but 3"),
    "label beyond the images": ("idx", IDX | {"train-labels-idx1-ubyte": idx(np.full(12, 12, np.uint8))}, {},
                                "train image 0 has label 12, expected 0 to 11"),
    "huge label": ("csv", {"a.csv": b"0,1,2,3,4\n4000000000000000000,1,2,3,4\n"}, {}, "image 1 has label 4000000"),
    "huge label in npz": ("npz", {"a.npz": npz(x=IMAGES, y=np.full(12, 2**40))}, {}, "has label 1099511627776"),
    "huge label in a test split": ("npz", {"a.npz": npz(x_train=IMAGES, y_train=LABELS, x_test=IMAGES,
                                   y_test=np.full(12, 2**62))}, {}, "test image 0 has label 4611686"),
    "negative labels": ("csv", {"a.csv": b"-4,1,2,3,4\n-1,1,2,3,4\n"}, {}, "label -4, expected 0 to 1"),
    "digits in csv": ("csv", {"a.csv": b"9" * 5000 + b",1,2,3,4\n"}, {}, "not a CSV of pixels"),
    "digits in npz": ("npz", {"a.npz": npz_of_digits()}, {}, "damaged or not an NPZ"),
    "digits in a pickle": ("cifar_python", five(cifar_pickle(RECORDS, labels=[10**5000] * 12)), {}, "too large"),
    "label too high": ("idx", IDX, {"classes": ("a", "b")}, "has label 2, expected 0 to 1"),
    "text": ("csv", {"a.csv": b"a,b,c,d,e\n"}, {}, "not a CSV of pixels"),
    "ragged": ("csv", {"a.csv": CSV + b"1,2\n"}, {}, "not a CSV of pixels"),
    "too wide": ("csv", {"a.csv": CSV + CSV.splitlines()[0] + b",7\n"}, {}, "not a CSV of pixels"),
    "over white": ("csv", {"a.csv": b"1,17,0,0,0\n"}, {"csv": CsvConfig(white=16)}, "outside 0 to 16"),
    "pixel of 256": ("csv", {"a.csv": b"1,256,0,0,0\n"}, {}, "not a CSV of pixels"),
    "no square": ("csv", {"a.csv": b"1,1,2,3\n"}, {}, "3 pixels a line are not 6×6"),
    "empty": ("csv", {"a.csv": b""}, {}, "expected a label and pixels"),
    "objects in npz": ("npz", {"a.npz": npz(x=np.array([[[{}]]]), y=[0])}, {}, "damaged or not an NPZ"),
    "npy": ("npz", {"a.npz": b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }"
            + b" " * 60 + b"\n\x00"}, {}, "NPZ"),
    "no pair": ("npz", {"a.npz": npz(pictures=IMAGES)}, {}, "no pair"),
    "floats over 1": ("npz", {"a.npz": npz(x=IMAGES.astype(float), y=LABELS)}, {}, "floats in 0 to 1"),
    "soft labels": ("npz", {"a.npz": npz(x=IMAGES, y=np.full((12, 2), 0.5))}, {}, "one-hot"),
    "not cifar": ("cifar_binary", {"a.tar.gz": tarred({"a.txt": b"a"}, "top")}, {}, "no data_batch_1.bin"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_named(tmp_path, case):
    format, files, changes, message = WRONG[case]
    with (
        pytest.raises(UserError, match=message) as caught,
        read(configured(format, files, **changes), write(tmp_path / "raw", files)),
    ):
        pass
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_missing_file_is_named(tmp_path):
    with (
        pytest.raises(UserError, match="run `dvc repro fetch` first"),
        read(configured("csv", ["a.csv"]), tmp_path),
    ):
        pass


# --- folders of images -----------------------------------------------------------------------------------


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


@pytest.mark.parametrize("valid", ["valid", "val", "validation", "Val"])
def test_folder_with_splits(tmp_path, valid):
    for split in ("train", valid, "test"):
        for name in ("cat", "dog"):
            picture(tmp_path / "raw" / split / name / "deep" / "1.png")
    with read(configured("image_folder", []), tmp_path / "raw") as data:
        assert data.classes == ("cat", "dog")
        assert {k: list(v.labels) for k, v in data.splits.items()} == {k: [0, 1] for k in ("train", "val", "test")}
        assert (data.root / data.splits["val"].images[0]).is_file()


def test_folder_of_classes_passes_over_hidden_files_and_lists_stray_images(tmp_path):
    raw = tmp_path / "raw"
    for name in ("b", "a", "c"):
        picture(raw / name / "1.png")
    picture(raw / "stray.png")
    (raw / "README.txt").write_text("notes")
    (raw / "a" / ".DS_Store").write_text("x")
    (raw / "__MACOSX").mkdir()
    (raw / "a" / "link.png").symlink_to(raw / "stray.png")
    with read(configured("image_folder", []), raw) as data:
        assert data.classes == ("a", "b", "c") and data.splits["train"].images == ["a/1.png", "b/1.png", "c/1.png"]
        assert data.rejected == (("a/link.png", "a symbolic link"), ("stray.png", "not in a class folder"))


@pytest.fixture
def outside(tmp_path):
    """A folder that links lead to, with a picture and a way back to itself."""
    picture(tmp_path / "outside" / "deep" / "secret.png")
    (tmp_path / "outside" / "loop").symlink_to(tmp_path / "outside")
    return tmp_path / "outside"


@pytest.mark.parametrize("layout", ["", "train/"])
def test_links_are_not_followed_wherever_they_lead(tmp_path, outside, layout):
    raw = tmp_path / "raw"
    for name in ("a", "b"):
        picture(raw / layout / name / "1.png")
    links = {
        f"{layout}a/file.png": outside / "deep" / "secret.png",
        f"{layout}a/folder": outside,
        f"{layout}a/dangling.png": tmp_path / "nothing",
        f"{layout}b/itself": raw / layout / "b",
        f"{layout}class": outside,
    }
    for name, target in links.items():
        (raw / name).symlink_to(target)
    with read(configured("image_folder", []), raw) as data:
        assert data.classes == ("a", "b")
        assert list(data.splits["train"].images) == [f"{layout}a/1.png", f"{layout}b/1.png"]
        assert data.rejected == tuple((name, "a symbolic link") for name in sorted(links))


def test_a_class_that_is_a_link_in_one_split_only(tmp_path, outside):
    raw = tmp_path / "raw"
    for name in ("train/a", "train/b", "test/a"):
        picture(raw / name / "1.png")
    (raw / "test" / "b").symlink_to(raw / "train" / "b")
    with read(configured("image_folder", []), raw) as data:
        assert list(data.splits["test"].images) == ["test/a/1.png"]
        assert data.rejected == (("test/b", "a symbolic link"),)


def test_a_pipe_is_not_waited_for(tmp_path):
    raw = tmp_path / "raw"
    for name in ("a", "b"):
        picture(raw / name / "1.png")
    os.mkfifo(raw / "a" / "pipe.png")
    with read(configured("image_folder", []), raw) as data:
        assert list(data.splits["train"].images) == ["a/1.png", "b/1.png"]
        assert data.rejected == (("a/pipe.png", "not a regular file"),)


EMPTY = {
    "no folders in it": (lambda raw: (raw / "test").mkdir(), r"raw/test: no images in it: add some, or take the"),
    "class folders without images": (
        lambda raw: (raw / "test" / "a").mkdir(parents=True),
        r"test: no images in it",
    ),
    "an empty validation split": (lambda raw: (raw / "valid").mkdir(), r"raw/valid: no images in it"),
    "links only": (
        lambda raw: (raw / "test").mkdir() or (raw / "test" / "a").symlink_to(raw / "train" / "a"),
        r"test: no images in it \(1 symbolic link, not followed\)",
    ),
}


@pytest.mark.parametrize("case", EMPTY)
def test_a_split_without_images_is_named(tmp_path, case):
    make, message = EMPTY[case]
    for name in ("a", "b"):
        picture(tmp_path / "raw" / "train" / name / "1.png")
    make(tmp_path / "raw")
    with pytest.raises(UserError, match=message), read(configured("image_folder", []), tmp_path / "raw"):
        pass


@pytest.mark.parametrize("name", [b"caf\xe9", b"tab\there"])
def test_a_class_whose_name_cannot_be_shown_is_named_all_the_same(tmp_path, name):
    picture(tmp_path / "raw" / "a" / "1.png")
    picture(tmp_path / "raw" / os.fsdecode(name) / "1.png")
    with (
        pytest.raises(UserError, match="rename it") as caught,
        read(configured("image_folder", []), tmp_path / "raw"),
    ):
        pass
    assert repr(name) in str(caught.value)


def test_names_of_any_script_are_classes(tmp_path):
    names = ["$5$", "naïve", "می\u200cخواهم", "猫\u3000犬"]
    for name in names:
        picture(tmp_path / "raw" / name / "1.png")
    with read(configured("image_folder", []), tmp_path / "raw") as data:
        assert data.classes == tuple(sorted(names))


def test_folder_inside_an_archive(tmp_path):
    files = {}
    for name in ("cat", "dog"):
        picture(tmp_path / "made" / name / "1.png")
        files[f"{name}/1.png"] = (tmp_path / "made" / name / "1.png").read_bytes()
    raw = write(tmp_path / "raw", {"photos.tar.gz": tarred(files, "photos")})
    with read(configured("image_folder", ["photos.tar.gz"]), raw) as data:
        assert data.classes == ("cat", "dog") and len(data.splits["train"]) == 2
        assert list(data.digests) == ["photos.tar.gz"]


@pytest.mark.parametrize(
    ("folders", "classes", "message"),
    [
        (["test/a"], None, "no train folder"),
        ([], None, "no class folders"),
        (["a", "b"], ("a", "c"), "folders b are not among data.classes"),
    ],
)
def test_wrong_folders_are_named(tmp_path, folders, classes, message):
    for folder in folders:
        picture(tmp_path / "raw" / folder / "1.png")
    (tmp_path / "raw").mkdir(exist_ok=True)
    with (
        pytest.raises(UserError, match=message),
        read(configured("image_folder", [], classes=classes), tmp_path / "raw"),
    ):
        pass
