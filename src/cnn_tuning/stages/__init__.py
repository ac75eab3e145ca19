"""One thin command per DVC stage: read configuration, one call, write outputs."""
