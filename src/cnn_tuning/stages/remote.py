"""`cnn-tuning remote init` and `policies`: the bucket, DVC's remote in it, and who may do what."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import click

from cnn_tuning.config import HostConfig, compose_sections
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_tables import Needed

REMOTE = "storage"


def init(bucket: str | None, overrides: Sequence[str], *, force: bool) -> None:
    """Make the bucket and DVC's remote in it, and print the policies that people and hosts need."""
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.bucket import make

    host = compose_sections(Needed, overrides).host
    name = bucket_of(bucket, host)
    url = f"s3://{name}/{host.prefix}/dvc"
    _check_remote(url, force)
    aws = Aws(host.region)
    aws.check()
    new = make(aws, name, host.prefix)
    click.echo(
        f"bucket {name} {'made' if new else 'was there'}: versioned, encrypted, private, TLS only", err=True
    )
    _dvc("remote", "add", "--force", "--default", REMOTE, url)
    _dvc("remote", "modify", REMOTE, "region", host.region)
    # What comes from the remote is hashed again before it is used.
    _dvc("remote", "modify", REMOTE, "verify", "true")
    click.echo(f"DVC remote {REMOTE}: {url} (in .dvc/config: commit it)", err=True)
    click.echo(f"put `host: {{bucket: {name}}}` into params.yaml", err=True)
    print_policies(name, overrides)


def print_policies(bucket: str | None, overrides: Sequence[str]) -> None:
    """Print the least-privilege policies as JSON."""
    from cnn_tuning.cloud import cluster, policies

    host = compose_sections(Needed, overrides).host
    name = bucket_of(bucket, host)
    told = {
        "person": policies.of_person(host.project, name, host.prefix),
        "person, for Ray clusters": cluster.of_person(host.project),
        "host": policies.of_host(host.project, "RUN", name, host.prefix),
        "guard": policies.of_guard(host.project, "RUN"),
        "bucket": {"Version": "2012-10-17", "Statement": [policies.of_bucket(name)]},
    }
    click.echo(json.dumps(told, indent=1))


def bucket_of(given: str | None, host: HostConfig) -> str:
    """Return a bucket's name: the one given, or the configuration's."""
    name = given or host.bucket
    if not name:
        raise UserError("name a bucket: `cnn-tuning remote init BUCKET`, or set host.bucket")
    return name.removeprefix("s3://").rstrip("/")


def _check_remote(url: str, force: bool) -> None:
    listed = dict(line.split()[:2] for line in _dvc("remote", "list").splitlines() if len(line.split()) > 1)
    if listed.get(REMOTE, url) != url and not force:
        raise UserError(f"DVC remote {REMOTE} is {listed[REMOTE]}: give --force to replace it by {url}")


def _dvc(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"dvc {' '.join(arguments[:2])}: {reason}")
    return done.stdout
