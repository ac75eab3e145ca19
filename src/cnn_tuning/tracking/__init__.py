"""Tracking: runs as an append-only spool on disk, and the only user of the MLflow client that delivers it."""
