"""The predictor: what it answers is what the network in memory says, whatever the pictures' form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live import png

from cnn_tuning.data.images import BadImage
from cnn_tuning.serving.predictor import BATCH, Predictor, fastest_device


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Predictor:
    return Predictor(bundle)


def test_probabilities_are_the_softmax_of_the_network_in_memory(
    trained: tuple[Any, Path], predictor: Predictor, digits: np.ndarray
) -> None:
    with torch.inference_mode():
        expected = torch.softmax(trained[0](torch.from_numpy(digits)), 1).numpy()
    answer = predictor.probabilities(digits)
    assert answer.dtype == np.float32 and answer.shape == (8, 10)
    np.testing.assert_array_equal(answer, expected)
    np.testing.assert_allclose(answer.sum(1), 1, atol=1e-6)
    assert len(set(answer.argmax(1))) > 1, "the images must be told apart, or the test shows nothing"


def test_many_images_are_answered_by_the_gpu_where_there_is_one(
    bundle: Path, predictor: Predictor, digits: np.ndarray
) -> None:
    device = fastest_device()
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")
    fast = Predictor(bundle, device=device)
    assert next(fast.network.parameters()).device.type == device
    answers = [fast.probabilities(digits) for _ in range(2)]
    np.testing.assert_array_equal(*answers)
    if device == "cpu":
        np.testing.assert_array_equal(answers[0], predictor.probabilities(digits))
    np.testing.assert_allclose(answers[0], predictor.probabilities(digits), atol=1e-5)


def test_more_images_than_a_batch(predictor: Predictor) -> None:
    images = np.random.default_rng(0).integers(0, 256, (BATCH + 3, 1, 28, 28), dtype=np.uint8)
    answer = predictor.probabilities(images)
    np.testing.assert_allclose(answer[BATCH:], predictor.probabilities(images[BATCH:]), atol=1e-6)
    assert answer.shape == (BATCH + 3, 10)


def test_no_images(predictor: Predictor) -> None:
    assert predictor.probabilities(np.empty((0, 1, 28, 28), np.uint8)).shape == (0, 10)
    assert predictor.predict([]) == []


def test_a_read_only_memory_map(predictor: Predictor, digits: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", digits)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    np.testing.assert_array_equal(predictor.probabilities(mapped), predictor.probabilities(digits))


def test_one_image_in_a_batch_as_alone(predictor: Predictor, digits: np.ndarray) -> None:
    together = predictor.probabilities(digits)
    for index in range(len(digits)):
        alone = predictor.probabilities(digits[index : index + 1])[0]
        np.testing.assert_allclose(alone, together[index], atol=1e-6)
        assert alone.argmax() == together[index].argmax()


def test_picture_array_and_bytes_agree(predictor: Predictor, digits: np.ndarray) -> None:
    arrays = [image[0] for image in digits]
    from_arrays = predictor.predict(arrays, top_k=3)
    assert predictor.predict([png(array) for array in arrays], top_k=3) == from_arrays
    assert predictor.predict([array[:, :, None] for array in arrays], top_k=3) == from_arrays


def test_top_k_is_sorted_and_begins_with_the_label(predictor: Predictor, digits: np.ndarray) -> None:
    for prediction in predictor.predict([digits[0, 0]], top_k=10):
        probabilities = [choice.probability for choice in prediction.top_k]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sorted(choice.index for choice in prediction.top_k) == list(range(10))
        first = prediction.top_k[0]
        assert (prediction.label, prediction.index, prediction.probability) == (
            first.label,
            first.index,
            first.probability,
        )
        assert all(predictor.classes[choice.index] == choice.label for choice in prediction.top_k)


def test_equal_probabilities_keep_class_order(predictor: Predictor) -> None:
    (prediction,) = predictor.choose(np.full((1, 10), 0.1, np.float32), top_k=3)
    assert [choice.index for choice in prediction.top_k] == [0, 1, 2]


def test_a_bad_image_is_named_by_its_row(predictor: Predictor, digits: np.ndarray) -> None:
    with pytest.raises(BadImage, match="row 1"):
        predictor.predict([digits[0, 0], b"no image"])
