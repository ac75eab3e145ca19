"""Ablations: arms trained with several seeds, compared, and what can be concluded in plain words."""
