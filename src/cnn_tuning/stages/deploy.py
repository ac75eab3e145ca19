"""`cnn-tuning deploy sagemaker|status|down|image`: the champion to where others reach it, and back to nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnn_tuning.errors import UserError
from cnn_tuning.serving import first_answer
from cnn_tuning.serving.settings import Deployed, Local, Registered, champion, settings_for
from cnn_tuning.stages.host_tables import figure, new_table, print_table
from cnn_tuning.tracking.store import tracking_uri

if TYPE_CHECKING:
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.serving.sagemaker import Plan


def sagemaker(overrides: Sequence[str], *, dry_run: bool, yes: bool) -> None:
    """Show what would be made, ask, make it, and ask it the first question."""
    began = first_answer.command_began()
    from rich.console import Console

    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.serving import sagemaker as edge
    from cnn_tuning.serving.server import registered

    own = settings_for(Deployed, "sagemaker", overrides)
    aws = Aws(own.host.region)
    name = champion(own.serving, own.registry)
    model = registered(name, tracking_uri(own.tracking))
    planned = edge.resolve(edge.plan(own.serving, own.host, model, aws), aws)
    there = edge.found(aws, planned.endpoint, planned.project)
    what = "there: its model is replaced" if there else "new"
    click.echo(f"endpoint {planned.endpoint} in {aws.region} ({what}): {planned.instances} × "
               f"{planned.instance_type}, {name} version {model.version}")  # fmt: skip
    click.echo(_price_line(planned, aws))
    if dry_run:
        click.echo("nothing was made (--dry-run)")
        return
    asked = time.time()
    if not yes:
        click.confirm("make it?", abort=True)
    began += time.time() - asked  # a person's thinking is not the command's time
    try:
        with Console(stderr=True).status("SageMaker makes the endpoint: this takes minutes"):
            edge.deploy(planned, aws)
            label = edge.ask(planned, aws)
    except (UserError, KeyboardInterrupt) as error:
        click.echo("what was made so far may cost money: `cnn-tuning deploy down` removes it", err=True)
        raise error
    told = replace(
        own.serving, endpoint=replace(own.serving.endpoint, role=None, image=None)
    )  # they name an account
    by = f"{model.name} version {model.version}"
    click.echo(f"endpoint {planned.endpoint} answers ({label!r} to a grey picture)")
    tags = {"model": by, "serving.where": "sagemaker"}
    first_answer.tell(f"deploy {by}", time.time() - began, told, own.tracking, tags)
    click.echo("end it: cnn-tuning deploy down")


def _price_line(plan: Plan, aws: Aws) -> str:
    from cnn_tuning.serving.sagemaker import hourly_price

    try:
        price = hourly_price(aws, plan.instance_type)
        why = f"no offer of {plan.instance_type} in {aws.region}"
    except UserError as error:
        price, why = None, str(error)
    if price is None:
        return f"price unknown ({why}): it is paid for until `cnn-tuning deploy down`"
    hourly = price * plan.instances
    return f"${hourly:.3f} an hour, ${hourly * 24:.2f} a day, until `cnn-tuning deploy down`"


def status(overrides: Sequence[str], *, as_json: bool) -> None:
    """Print the endpoints of this project in its region."""
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.serving.teardown import endpoints

    own = settings_for(Deployed, "sagemaker", overrides)
    there = endpoints(Aws(own.host.region), own.host.project)
    if as_json:
        click.echo(json.dumps([asdict(endpoint) for endpoint in there], indent=1))
        return
    if not there:
        click.echo(f"no endpoints of {own.host.project} in {own.host.region}")
        return
    table = new_table("endpoint", "status", "model", "instances", "hours", "$ an hour", "$ so far")
    for endpoint in there:
        price = endpoint.dollars_per_hour
        table.add_row(
            endpoint.name,
            endpoint.status,
            endpoint.model,
            f"{endpoint.instances} × {endpoint.instance_type}",
            f"{endpoint.hours:.1f}",
            figure(price, ".3f"),
            figure(None if price is None else price * endpoint.hours, ".2f"),
        )
    print_table(table)


def down(overrides: Sequence[str]) -> None:
    """Remove the endpoint and all that was made for it."""
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.serving.sagemaker import endpoint_name
    from cnn_tuning.serving.teardown import remove

    own = settings_for(Deployed, "sagemaker", overrides)
    name = endpoint_name(own.serving, own.serving.model or own.registry.model)
    bucket = own.serving.endpoint.bucket or own.host.bucket
    gone = remove(Aws(own.host.region), name, own.host.project, bucket)
    if not any(asdict(gone).values()):
        click.echo(f"endpoint {name}: nothing is there in {own.host.region}")
        return
    counts = ", ".join(f"{count} {what}" for what, count in asdict(gone).items())
    click.echo(f"endpoint {name}: removed {counts}")


def image(overrides: Sequence[str], model: str | None, context: Path | None) -> None:
    """Build an image, or write what it is built from."""
    from cnn_tuning.serving import container
    from cnn_tuning.serving.server import is_uri, registered

    if model and not is_uri(model):
        serving, uri, version, store = settings_for(Local, "container", overrides).serving, model, "", None
    else:
        own = settings_for(Registered, "container", overrides)
        serving, store = own.serving, tracking_uri(own.tracking)
        named = registered(model or champion(serving, own.registry), store)
        uri, version = named.uri, named.version
    tag = container.tag_of(serving, version)
    if context is not None:
        container.write_context(uri, context, serving, store)
        click.echo(f"{context}: Dockerfile and model; build it: docker build --tag {tag} {context}")
    else:
        container.build(uri, tag, serving, store)
        click.echo(f"image {tag} is built")
    click.echo(f"run it: {container.run_line(serving, tag)}")
