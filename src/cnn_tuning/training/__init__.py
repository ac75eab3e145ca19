"""One way to train: fit."""
