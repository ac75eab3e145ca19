"""The rules by name. Each is one function of a recording and its thresholds, by keyword."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from cnn_tuning.diagnosis.findings import Finding
from cnn_tuning.diagnosis.rules import answers, data, generalisation, gpu, loss, profile, rate, signals, tensors

RULES: dict[str, Callable[..., Finding]] = {
    rule.__name__: rule
    for rule in (
        loss.not_finite,
        loss.loss_not_decreasing,
        loss.stalled,
        loss.loss_spikes,
        generalisation.overfitting,
        generalisation.overtraining,
        generalisation.underfitting,
        rate.learning_rate_too_high,
        rate.learning_rate_too_low,
        data.class_imbalance,
        data.inputs_not_normalised,
        data.leakage,
        answers.low_recall,
        answers.confused_pairs,
        answers.label_errors,
        signals.poor_initialisation,
        tensors.vanishing_gradients,
        tensors.exploding_gradients,
        signals.dead_relus,
        signals.saturated_activations,
        tensors.update_ratio,
        tensors.unchanged_weights,
        tensors.zero_tensors,
        profile.slow_loader,
        profile.io_bottleneck,
        profile.memory_growth,
        profile.step_outliers,
        profile.long_initialisation,
        gpu.low_gpu_utilisation,
        gpu.cpu_bottleneck,
        gpu.small_batch,
    )
}

# What they judge is known at the end only: answers, data, and where the time went.
AT_THE_END = {
    name for name, rule in RULES.items() if rule.__module__ in {m.__name__ for m in (answers, data, gpu, profile)}
}


def thresholds_of(rule: str) -> list[str]:
    """Return the names of a rule's thresholds: its keyword-only parameters."""
    parameters = inspect.signature(RULES[rule]).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
