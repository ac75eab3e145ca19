"""What a learning-rate range test says: its `Sweep` in, a rate out."""

from __future__ import annotations

import numpy as np

from cnn_tuning.diagnosis.recording import Sweep

# A loss that has not lost this share of its first value has not fallen.
FALL = 0.1


def suggested(sweep: Sweep) -> float | None:
    """Return the rate at which the loss falls most steeply over the logarithm of the rate, before its minimum.

    The rule of fastai's `lr_find` (`steep`; Gugger 2018, "How do you find a good learning rate"). None where the
    loss does not fall.
    """
    loss = sweep.loss.astype(np.float64)
    if len(loss) < 3 or not np.isfinite(loss).all():
        return None
    lowest = int(loss.argmin())
    if lowest == 0 or loss[lowest] > (1 - FALL) * loss[0]:
        return None
    slope = np.gradient(loss, np.log(sweep.learning_rate.astype(np.float64)))
    return float(sweep.learning_rate[int(slope[: lowest + 1].argmin())])
