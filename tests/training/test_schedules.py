"""Learning rates by step, as shares of the configured one: what each schedule does, with and without warm-up."""

from __future__ import annotations

import pytest
import torch

from cnn_tuning.config import ScheduleConfig, validate
from cnn_tuning.training.optimisation import build_schedule

STEPS_PER_EPOCH = 3
STEPS = 9
TABLE = {
    "constant": ({"name": "constant"}, [1] * 9),
    "constant, warm-up": ({"name": "constant", "warmup_epochs": 1.0}, [0.25, 0.5, 0.75, *[1] * 6]),
    "cosine": (
        {"name": "cosine"},
        [1, 0.9698, 0.8830, 0.75, 0.5868, 0.4132, 0.25, 0.1170, 0.0302],
    ),
    "cosine, warm-up, to a tenth": (
        {"name": "cosine", "warmup_epochs": 1.0, "final_fraction": 0.1},
        [0.25, 0.5, 0.75, 1, 0.9397, 0.775, 0.55, 0.325, 0.1603],
    ),
    "step": ({"name": "step", "every_epochs": 1, "factor": 0.1}, [*[1] * 3, *[0.1] * 3, *[0.01] * 3]),
    "step, warm-up": (
        {"name": "step", "every_epochs": 2, "factor": 0.1, "warmup_epochs": 0.67},
        [1 / 3, 2 / 3, 1, 1, 1, 1, 0.1, 0.1, 0.1],
    ),
    "one cycle": (
        {"name": "one_cycle", "peak_at": 0.3, "initial_division": 5.0, "final_division": 5.0, "anneal": "linear"},
        [0.2, 0.6, 1, *(1 - 0.96 * step / 7 for step in range(1, 7))],
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_learning_rate_by_step(case):
    values, expected = TABLE[case]
    assert rates(values, STEPS) == pytest.approx(expected, abs=1e-4)


def test_plateau_falls_once_the_loss_has_not_for_more_epochs_than_its_patience():
    optimizer, schedule = made({"name": "plateau", "factor": 0.1, "patience": 2})
    seen = []
    for loss in (0.9, 0.8, 0.8, 0.8, 0.8, 0.7, 0.6):
        schedule.step(loss)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1])


def test_a_part_at_a_share_of_the_rate_keeps_its_share():
    """A pretrained body at a tenth, the head at all of it."""
    body, head = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [body], "lr": 0.1}, {"params": [head], "lr": 1.0}])
    schedule = build_schedule(optimizer, validate(ScheduleConfig, {"name": "one_cycle"}), STEPS, STEPS_PER_EPOCH)
    for _ in range(STEPS):
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert slow == pytest.approx(0.1 * fast)
        optimizer.step()
        schedule.step()


def made(values):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, build_schedule(optimizer, validate(ScheduleConfig, values), STEPS, STEPS_PER_EPOCH)


def rates(values, steps):
    optimizer, schedule = made(values)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen
