"""The gate: who is promoted, and the sentence that says why."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.errors import UserError
from cnn_tuning.tracking.gate import Gate, Predictions, decide, read_predictions, write_predictions

GATE = Gate(significance=0.05, minimum_gain=0.0)


def _predictions(right: list[bool], split: str = "s") -> Predictions:
    return Predictions(split, {i: (3, 3 if ok else 4) for i, ok in enumerate(right)})


def test_significant_gain_is_promoted():
    verdict = decide(_predictions([True] * 100), _predictions([True] * 90 + [False] * 10), "7", GATE)
    assert verdict.promoted
    assert verdict.reason == (
        "promoted: 100.00% against 90.00% of version 7 on the same 100 test images "
        "(10 won, 0 lost, exact McNemar p = 0.002)"
    )


@pytest.mark.parametrize(
    ("better", "gate", "why"),
    [
        (3, GATE, "not significant at 0.05"),
        (0, GATE, "no gain"),
        (10, Gate(0.05, 0.2), "gains less than 20.00%"),
    ],
)
def test_less_is_not(better, gate, why):
    champion = _predictions([True] * (100 - better) + [False] * better)
    verdict = decide(_predictions([True] * 100), champion, "7", gate)
    assert not verdict.promoted
    assert verdict.reason.endswith(why)


def test_another_test_split_is_never_compared():
    verdict = decide(_predictions([True] * 100, "a"), _predictions([False] * 100, "b"), "7", GATE)
    assert not verdict.promoted
    assert "another test split" in verdict.reason


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_never_both_ways(pairs):
    first, second = (_predictions(list(side)) for side in zip(*pairs, strict=True))
    verdicts = [decide(first, second, "1", GATE), decide(second, first, "2", GATE)]
    assert sum(v.promoted for v in verdicts) <= 1
    for verdict, (new, old) in zip(verdicts, [(first, second), (second, first)], strict=True):
        assert not verdict.promoted or new.accuracy > old.accuracy


def test_file_reads_as_written(tmp_path: Path):
    path = tmp_path / "p.csv"
    write_predictions(path, "md5abc", [(0, 7, 7, 0.99), (5, 1, 2, 0.5)])
    assert path.read_text() == (
        "# test_split=md5abc\nindex,label,predicted,probability\n0,7,7,0.990000\n5,1,2,0.500000\n"
    )
    assert read_predictions(path) == Predictions("md5abc", {0: (7, 7), 5: (1, 2)})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("index,label,predicted,probability\n0,1,1,1\n", ":1:"),
        ("# test_split=x\nindex,label,predicted,probability\n0,1,1,1\n1,one,1,1\n", ":4:"),
        ("# test_split=x\nindex,label,predicted,probability\n", "no predictions"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text, place):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=place):
        read_predictions(path)
