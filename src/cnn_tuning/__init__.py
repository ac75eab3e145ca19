"""Reproducible training, tuning, evaluation and serving of image-classification CNNs."""
