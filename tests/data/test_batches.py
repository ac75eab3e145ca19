"""Batches: order and augmentation are functions of (seed, epoch, batch), and each image is changed alone."""

from __future__ import annotations

import functools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_recipes import recipe_with

from cnn_tuning.config import AugmentConfig, patch
from cnn_tuning.data.augment import augment
from cnn_tuning.data.batches import Batches, DataModule, Purpose, epoch_order, seed_of, seeded, sequential_order

CPU = torch.device("cpu")
ALL = AugmentConfig("all", shift=0.2, rotate_degrees=10, scale=0.1, shear_degrees=5, flip=True, cutout=0.3)


@given(count=st.integers(1, 500), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_visits_every_image_once_in_a_repeatable_order(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    assert torch.equal(order, epoch_order(count, seed, epoch))


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@given(
    count=st.integers(10, 300), parts=st.integers(2, 6), epochs=st.integers(1, 7), seed=st.integers(0, 2**31 - 1)
)
def test_parts_are_learnt_one_after_the_other_with_as_many_passes_each(count, parts, epochs, seed):
    size = count // parts
    visited = [
        sequential_order(count, seed, epoch, parts, epochs).split(size) for epoch in range(epochs)
    ]  # passes over one part each
    passes = [set(part.tolist()) for epoch in visited for part in epoch]
    assert len(passes) == parts * epochs
    seen = []
    for number in range(parts):
        own = passes[number * epochs : (number + 1) * epochs]
        assert all(members == own[0] for members in own)  # the same images in each pass
        assert len(own[0]) == size
        seen.append(own[0])
    assert len(set.union(*seen)) == size * parts  # no image in two parts


def test_training_by_parts_makes_as_many_updates(packed, recipe):
    by_parts = patch(recipe, {"trainer.sequential_parts": 5, "trainer.batch_size": 20})
    batches = DataModule(packed, by_parts, CPU).train
    assert sum(1 for _ in batches) == len(batches)
    joint = DataModule(packed, patch(by_parts, {"trainer.sequential_parts": 1}), CPU).train
    assert abs(len(joint) - len(batches)) <= 1


@functools.cache
def plain():
    return recipe_with(["trainer.workers=0", "augment=none"])


@given(count=st.integers(1, 120), size=st.integers(1, 60), resident=st.booleans())
@settings(max_examples=40)
def test_no_training_batch_is_a_single_image_where_there_are_more(packed, count, size, resident):
    recipe = patch(plain(), {"trainer.batch_size": size})
    split, rows = packed.split("train"), np.arange(count)
    batches = Batches(split, recipe, CPU, resident=resident, train=True, rows=rows)
    sizes = [len(labels) for _, labels in batches]
    assert (len(sizes), sum(sizes)) == (len(batches), count)
    assert min(sizes) > 1 or size == 1 or count == 1
    assert all(one in (size, size + 1) for one in sizes[:-1])
    measured = Batches(split, recipe, CPU, resident=resident, train=False, rows=rows)
    assert sum(len(labels) for _, labels in measured) == count


@given(key=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3))
def test_purposes_never_share_a_stream(key):
    assert len({seed_of(purpose, *key) for purpose in Purpose}) == len(Purpose)


def test_iteration_may_begin_inside_an_epoch(packed):
    recipe = recipe_with(["augment=affine"])
    whole = Batches(packed.split("train"), recipe, CPU, resident=True, train=True)
    epochs = [list(whole), list(whole)]
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])
    later = Batches(packed.split("train"), recipe, CPU, resident=True, train=True)
    later.begin_at(1, 7)
    rest = list(later)
    assert len(rest) == len(whole) - 7
    for (images, labels), (expected, expected_labels) in zip(rest, epochs[1][7:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


def test_measured_parts_are_unaugmented_and_of_equal_size(packed):
    module = DataModule(packed, recipe_with(["augment=affine"]), CPU)
    part, val = (torch.cat([images for images, _ in batches]) for batches in module.val_dataloader())
    assert len(part) == len(val) == len(packed.split("val"))
    assert part.dtype == torch.uint8
    assert torch.equal(val, torch.from_numpy(packed.split("val").images.copy()))
    labels = torch.cat([labels for _, labels in module.val_dataloader()[0]])
    shares = torch.bincount(labels) / len(labels)
    whole = torch.bincount(torch.from_numpy(packed.split("train").labels)) / len(packed.split("train"))
    assert (shares - whole).abs().max() < 0.02


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), channels=st.sampled_from([1, 3]), side=st.integers(8, 33))
def test_augmentation_repeats_keeps_shape_and_range_and_treats_images_alone(seed, channels, side):
    images = torch.randint(
        0, 256, (6, channels, side, side), dtype=torch.uint8, generator=seeded(Purpose.AUGMENTATION, seed)
    )
    one, two = (augment(images, ALL, seeded(Purpose.AUGMENTATION, seed, 1)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == images.shape
    assert one.min() >= 0
    assert one.max() <= 1.0001
    other = images.clone()
    other[0] = 0
    assert torch.equal(augment(other, ALL, seeded(Purpose.AUGMENTATION, seed, 1))[1:], one[1:])


@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1), share=st.floats(0.05, 0.3))
def test_a_shift_moves_whole_pixels_by_at_most_its_share(seed, share):
    side = 20
    dot = torch.zeros(16, 1, side, side, dtype=torch.uint8)
    dot[:, :, 10, 10] = 200
    moved = augment(dot, AugmentConfig("s", shift=share), seeded(Purpose.AUGMENTATION, seed))
    assert moved.dtype == torch.uint8
    for image in moved[:, 0]:
        (place,) = image.nonzero().tolist()
        assert image[tuple(place)] == 200
        assert max(abs(place[0] - 10), abs(place[1] - 10)) <= round(share * side)


def test_no_augmentation_changes_nothing():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert augment(images, AugmentConfig("none"), seeded(0)) is images
