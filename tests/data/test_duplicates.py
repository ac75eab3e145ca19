"""Near-duplicates are found whatever was done to the copy; other pictures are not paired."""

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from cnn_tuning.data import duplicates
from cnn_tuning.data.duplicates import near_duplicates
from cnn_tuning.data.stand_in import draw
from cnn_tuning.data.survey import look


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


COPIES = {
    "smaller": lambda image: image.resize((90, 70)),
    "worse": lambda image: jpeg(image, 30),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "cut a little": lambda image: image.crop((2, 2, 158, 118)),
    "grey": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_nothing_else(kind, tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(draw(i, 30, (160, 120), rng)) for i in range(30)]
    for i, image in enumerate([*images, *map(COPIES[kind], images[:5])]):
        image.save(tmp_path / f"{i:02}.png")
    seen = [look(tmp_path, f"{i:02}.png") for i in range(35)]
    thumbnails = np.array([np.frombuffer(s[5], np.uint8) for s in seen])
    pairs = near_duplicates(np.array([s[4] for s in seen], np.uint64), thumbnails)
    assert pairs.tolist() == [[i, 30 + i] for i in range(5)]


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 120), st.integers(0, 6))
def test_all_pairs_within_the_bits_are_found(seed, count, flips):
    """Against a comparison of each with each; thumbnails alike, so that only hashes decide."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, max(1, count // 3), dtype=np.uint64)
    hashes = base[rng.integers(0, len(base), count)]
    for _ in range(flips):
        hashes ^= np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
    hashes = np.unique(hashes)
    thumbnails = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (len(hashes), 1))
    every = itertools.combinations(range(len(hashes)), 2)
    expected = [[a, b] for a, b in every if (int(hashes[a]) ^ int(hashes[b])).bit_count() <= duplicates.BITS]
    assert near_duplicates(hashes, thumbnails).tolist() == expected


def test_many_copies_make_a_chain_and_flat_pictures_none():
    hashes = np.full(1000, 7, np.uint64)
    thumbnails = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (1000, 1))
    assert len(near_duplicates(hashes, thumbnails)) == 999
    assert len(near_duplicates(hashes, np.full_like(thumbnails, 9))) == 0
