"""Searching hyperparameters with Optuna: several processes on one study, and what it found."""
