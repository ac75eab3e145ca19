"""Rules on data and answers: chance does not fire them, a fault in the data does, and names what is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from curve_recordings import answers, check_remedy, judged, recording
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_tuning.diagnosis.findings import Finding
from cnn_tuning.diagnosis.recording import Data

RULES = ("class_imbalance", "inputs_not_normalised", "leakage", "low_recall", "confused_pairs", "label_errors")
HEALTHY = answers(np.diag([498] * 10) + np.eye(10, k=1, dtype=int) * 2 + np.eye(10, k=-9, dtype=int) * 2)


def found(rule: str, data: Data | None, **thresholds: float) -> Finding:
    return judged(rule, recording(data=data), **thresholds)


@pytest.mark.parametrize("rule", RULES)
def test_without_data_nothing_is_evaluated(rule):
    assert found(rule, None).status == "not evaluated"


@pytest.mark.parametrize("rule", RULES)
def test_a_network_with_99_6_percent_on_clean_data_is_ok(rule):
    assert found(rule, HEALTHY).status == "ok"


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=12))
def test_imbalance_is_the_ratio_of_class_sizes(counts):
    finding = found("class_imbalance", answers(np.eye(len(counts), dtype=int), counts=counts))
    if sum(counts) == 0:
        assert finding.status == "not evaluated"
    else:
        assert (finding.status == "fired") == (max(counts) > 10 * min(counts))


def test_imbalance_names_the_rare_classes():
    finding = found("class_imbalance", answers(np.eye(4, dtype=int), counts=[1000, 990, 20, 0]))
    assert finding.evidence["rare classes"] == ["class 3", "class 2"]
    assert "'class 3' 0" in finding.explanation and finding.remedy == {}
    assert finding.first_step == 1


@pytest.mark.parametrize(("mean", "std"), [(0.13, 0.31), (33.3, 78.6), (0.0, 0.1), (-0.9, 1.0)])
def test_pixels_as_they_are_are_not_normalised(mean, std):
    data = answers([[9]], input_mean=np.array([0, mean], np.float32), input_std=np.array([1, std], np.float32))
    finding = found("inputs_not_normalised", data)
    assert finding.status == "fired" and "channel 1" in finding.explanation


def test_inputs_that_were_not_measured_are_not_evaluated():
    data = answers([[9]], input_mean=np.array([np.nan], np.float32))
    assert found("inputs_not_normalised", data).status == "not evaluated"


def test_images_in_both_splits_are_told_by_position():
    data = answers(np.diag([50, 50]), shared=np.array([[3, 7], [8, 7], [9, 12]]))
    finding = found("leakage", data)
    assert finding.status == "fired" and finding.evidence["images in both"] == 2
    assert finding.first_step == 1
    assert finding.evidence["positions (train, val)"] == [[3, 7], [8, 7], [9, 12]]


def test_no_leak_in_a_part_of_the_training_split_says_nothing_of_the_rest():
    part = answers(np.diag([50, 50]), counts=[1000, 1000], compared=100)
    finding = found("leakage", part)
    assert finding.status == "not evaluated" and "100 of 2,000" in finding.explanation
    assert found("leakage", replace(part, shared=np.array([[3, 7]]))).status == "fired"
    assert found("leakage", replace(part, compared=2000)).status == "ok"


def test_conflicts_in_a_part_of_the_training_split_count_as_a_share_of_it():
    part = answers(np.diag([100] * 10), counts=[10_000] * 10, compared=1000, conflicting=40)
    assert "40 of 1,000" in found("label_errors", part).explanation
    assert found("label_errors", replace(part, compared=None)).status == "ok"


@pytest.mark.parametrize("rule", ["low_recall", "confused_pairs"])
def test_one_class_with_images_enough_says_nothing_of_the_others(rule):
    finding = found(rule, answers(np.diag([10, 2, 2, 2, 2])))
    assert finding.status == "not evaluated" and "1 of 5 classes" in finding.explanation
    assert found(rule, answers(np.diag([10, 12, 14, 12, 2]))).status == "ok"


@pytest.mark.parametrize(("images", "status"), [(12, "ok"), (1200, "fired")])
def test_low_recall_needs_images_enough(images, status):
    table = np.diag([images] * 5)
    table[2, 2], table[2, 3] = images * 3 // 4, images // 4
    finding = found("low_recall", answers(table))
    assert finding.status == status
    if status == "fired":
        assert finding.evidence["classes"] == ["class 2"]


@given(st.integers(11, 400), st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=50)
def test_more_images_lost_never_hide_a_low_recall(images, one, other):
    fired = []
    for lost in sorted((min(one, images), min(other, images))):
        table = np.diag([images] * 8)
        table[0, 0], table[0, 1] = images - lost, lost
        fired.append(found("low_recall", answers(table)).status == "fired")
    assert fired[0] <= fired[1]


@given(st.integers(5, 300), st.integers(2, 12), st.floats(0, 0.04))
@settings(max_examples=50)
def test_balanced_data_do_not_fire_confused_pairs(images, classes, share):
    """Mistakes that are spread over pairs, each below the share."""
    wrong = int(images * share)
    table = np.diag([images - wrong] * classes) + np.roll(np.eye(classes, dtype=int), 1, axis=1) * wrong
    assert found("confused_pairs", answers(table)).status != "fired"


def test_the_pair_that_is_confused_is_named():
    table = np.diag([100] * 10)
    table[4, 4], table[4, 9] = 60, 40
    finding = found("confused_pairs", answers(table))
    assert finding.status == "fired" and len(finding.evidence["pairs"]) == 1
    assert finding.evidence["pairs"][0] | {"share": 0.4} == {
        "class": "class 4",
        "taken for": "class 9",
        "images": 40,
        "share": 0.4,
    }


def test_a_network_that_has_learnt_nothing_tells_nothing_of_the_data():
    guessing = answers(np.eye(10, dtype=int)[:, :1] * 0 + np.array([[50] + [0] * 9] * 10))
    for rule in ("low_recall", "confused_pairs", "label_errors"):
        assert found(rule, guessing).status == "not evaluated"


def test_one_class_or_no_image_is_not_evaluated():
    assert found("label_errors", answers([[40]])).status == "not evaluated"
    for rule in ("low_recall", "confused_pairs", "label_errors", "leakage"):
        assert found(rule, answers(np.zeros((3, 3), int))).status == "not evaluated"


def test_wrong_labels_are_found_at_their_positions():
    data = answers(np.diag([100] * 10))
    wrong = np.arange(5, 1000, 25)
    labels = data.labels.copy()
    labels[wrong] = (labels[wrong] + 3) % 10
    finding = found("label_errors", answers(np.diag([100] * 10), labels=labels))
    assert finding.status == "fired" and finding.evidence["suspected"] == len(wrong)
    assert set(finding.evidence["positions"]) <= set(wrong.tolist())
    assert finding.remedy == {"trainer.label_smoothing": 0.1}
    check_remedy(finding)


def test_classes_without_validation_images_do_not_matter_to_label_errors():
    table = np.diag([100] * 10)
    table[6] = 0
    assert found("label_errors", answers(table)).status == "ok"


def test_equal_images_with_different_labels_are_label_errors():
    assert found("label_errors", answers(np.diag([100] * 10), conflicting=400)).status == "fired"
    assert found("label_errors", answers(np.diag([100] * 10), conflicting=4)).status == "ok"
