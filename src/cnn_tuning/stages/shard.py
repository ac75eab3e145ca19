"""Write the prepared training split as shards for `trainer.stream`: `cnn-tuning shard FOLDER|s3://BUCKET/PREFIX`."""

from __future__ import annotations

from pathlib import Path

import click

from cnn_tuning.data.packed import PackedData
from cnn_tuning.data.progress import with_progress
from cnn_tuning.data.shards import write_shards


def shard(destination: str, data: Path, shard_mb: float) -> None:
    """Verify the split and write it; the index, without which there are no shards, comes last."""
    packed = PackedData.open(data)
    packed.verify("train")
    index = write_shards(packed, destination, shard_mb, lambda parts, count: with_progress(parts, "shards", count))
    click.echo(
        f"{destination}: {sum(index.sizes):,} images of {packed.meta.name} in {len(index.sizes)} shards, "
        f"{sum(index.bytes) / 1e6:.1f} MB"
    )
