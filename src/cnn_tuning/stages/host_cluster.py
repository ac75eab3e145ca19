"""`cnn-tuning host cluster`: a file for `ray up`, and what it needs in the account; no host is started."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import HostConfig, compose_sections
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_tables import Needed
from cnn_tuning.stages.remote import bucket_of

if TYPE_CHECKING:
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.cluster import Kind

FOLDER = Path(".state/clusters")


def cluster(
    overrides: Sequence[str], *, workers: int, worker: str | None, head: str | None, name: str | None
) -> None:
    """Write the configuration and its token, upload the code, and say what it may cost and what comes next."""
    from cnn_tuning.cloud import code
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.cluster import cluster_config, prepare
    from cnn_tuning.cloud.inventory import utc_now
    from cnn_tuning.cloud.launch import find_places
    from cnn_tuning.cloud.names import Order, check_run, lifetime
    from cnn_tuning.cloud.teardown import remove
    from cnn_tuning.stages.host_next import owner

    host = compose_sections(Needed, overrides).host
    run = check_run(name or f"cluster-{secrets.token_hex(3)}")
    aws = Aws(host.region)
    aws.check()
    bucket = bucket_of(None, host)
    types = (head or _head(host), worker or _worker(host))
    per_hour = _per_hour(aws, host, types, workers)
    places, vpc = find_places(aws, host, types)
    kinds = [_kind(aws, host, kind, places) for kind in types]
    taken = code.snapshot(Path())
    lives = lifetime(host.max_hours, host.budget, per_hour)
    order = Order(run, owner(), taken.commit, host.budget, utc_now() + lives)
    file, token = FOLDER / f"{run}.yaml", FOLDER / f"{run}.token"
    _write_token(token)
    try:
        group = prepare(aws, host, order, vpc)
        code.upload(aws.client("s3"), Path(), taken.commit, run, bucket, host.prefix)
    except BaseException:
        token.unlink()
        remove(aws, host.project, run)
        raise
    config = cluster_config(
        host, order, head=kinds[0], worker=kinds[1], workers=workers, group=group, token=token.resolve()
    )
    file.write_text(_yaml(config))
    hours = lives.total_seconds() / 3600
    click.echo(f"{file}: head {types[0]} on demand, up to {workers} × {types[1]} {host.market}")
    click.echo(
        f"all of them end by {order.ends:%Y-%m-%d %H:%M} UTC ({hours:.2f} h), at ${per_hour * hours:.2f} at most"
    )
    click.echo(f"start it: dvc push && ray up {file}; be rid of it: cnn-tuning host down {run}")


def _head(host: HostConfig) -> str:
    """Return the smallest type without a GPU: the head trains nothing but the refit."""
    plain = {name: kind for name, kind in host.types.items() if kind.gpu is None and not kind.retired}
    if not plain:
        raise UserError("no type without a GPU in host.types: name the head's with --head")
    return min(plain, key=lambda name: plain[name].vcpus)


def _worker(host: HostConfig) -> str:
    from cnn_tuning.cloud.plan import unsuited

    known = (name for name in host.candidates if name in host.types)
    found = next((name for name in known if not unsuited(host, host.types[name])), None)
    if found is None:
        raise UserError("no type of host.candidates can be taken: see `cnn-tuning host plan`")
    return found


def _per_hour(aws: Aws, host: HostConfig, types: tuple[str, str], workers: int) -> float:
    """Return the most that the cluster may cost per hour; spot is never dearer than its cap, or on demand."""
    from cnn_tuning.cloud.plan import extras_per_hour
    from cnn_tuning.cloud.prices import on_demand_prices

    dollars = on_demand_prices(aws, sorted(set(types)))
    cap = host.max_price_per_hour if host.market == "spot" else None
    each = min((price for price in (dollars.get(types[1]), cap) if price is not None), default=None)
    if types[0] not in dollars or each is None:
        missing = types[0] if types[0] not in dollars else types[1]
        raise UserError(
            f"price unknown: {missing}: name another type, or (for workers) set host.max_price_per_hour"
        )
    return dollars[types[0]] + workers * each + (1 + workers) * extras_per_hour(host)


def _kind(aws: Aws, host: HostConfig, name: str, places: Sequence[tuple[str, str]]) -> Kind:
    from cnn_tuning.cloud.cluster import Kind
    from cnn_tuning.cloud.launch import resolve_image, root_device

    subnets = tuple(subnet for kind, subnet in places if kind == name)
    if not subnets:
        raise UserError(f"no subnet is in a zone of {host.region} that offers {name}")
    image = resolve_image(aws, host, name)
    return Kind(name, image, root_device(aws, image), subnets)


def _write_token(path: Path) -> None:
    """Make the secret that lets a process into the cluster; only this user reads it, nobody sees it printed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))


def _yaml(config: dict) -> str:
    import yaml

    head = "# Made by `cnn-tuning host cluster`; docs/scale.md says how it is used.\n"
    # Through JSON: what two entries share would be written as a reference.
    return head + yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, width=110)
