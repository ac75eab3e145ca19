"""Networks as plain modules, and the bundle (weights + specification) they are kept in."""
