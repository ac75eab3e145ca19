"""Metrics with intervals and paired tests on the test split."""
