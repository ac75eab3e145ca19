"""`cnn-tuning host …` and `cnn-tuning remote …`: configuration in, tables and JSON out; the work is in `cloud`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnn_tuning.config import (
    LOCK,
    Config,
    DataConfig,
    HostConfig,
    ModelConfig,
    arms,
    compose,
    compose_sections,
    load_locked,
    recipe_of,
)
from cnn_tuning.errors import UserError

if TYPE_CHECKING:
    from datetime import datetime

    from rich.table import Table

    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.inventory import Leftover, Thing
    from cnn_tuning.cloud.ledger import Bill
    from cnn_tuning.cloud.plan import Measured, Option

META = Path("data/prepared/meta.json")
TRAINING = Path("results/training/training.json")
REMOTE = "storage"


@dataclass(frozen=True)
class Needed:
    """The section that all commands but `plan` read."""

    host: HostConfig


@dataclass(frozen=True)
class _Trained:
    data: DataConfig
    model: ModelConfig


def plan(overrides: Sequence[str], measured: Sequence[str], *, as_json: bool) -> None:
    """Print which hosts could run this experiment, for how long and how much."""
    from cnn_tuning.cloud.aws import Aws

    config = compose(overrides)
    _planned(config, measured, Aws(config.host.region), as_json=as_json)


def _planned(config: Config, measured: Sequence[str], aws: Aws, *, as_json: bool = False) -> list[Option]:
    from cnn_tuning.cloud.plan import Work, rank
    from cnn_tuning.cloud.prices import ask_market

    runs = [*_measured_here(config), *map(_measured_there, measured)]
    images, epochs = _training_images(config), _epochs(config)
    market = ask_market(aws, config.host.candidates)
    work = Work(None if images is None else int(images * epochs), config.model.name)
    options = rank(config.host, work, runs, market)
    if as_json:
        about = {"experiment": config.experiment, "training_images": images, "epochs": epochs,
                 "market": config.host.market, "region": config.host.region, "notes": market.notes}  # fmt: skip
        click.echo(json.dumps({**about, "options": [asdict(option) for option in options]}, indent=1))
        return options
    counted = "an unknown number of" if images is None else f"{images:,}"
    click.echo(f"{config.experiment}: {counted} training images × {epochs:g} epochs in all trainings")
    _print_plan(options)
    if images is None:
        click.echo("How many images there are is not known yet, so neither are hours: run `dvc repro preprocess`.")
    for note in (*market.notes, *_reservations(config, options)):
        click.echo(note)
    return options


def _print_plan(options: Sequence[Option]) -> None:
    table = _table("type", "GPU", "vCPU", "images/s", "hours", "$ on demand", "quota", "$ spot by zone")
    quota = {True: "ok", False: "too low", None: "?"}
    for option in options:
        spot = ", ".join(f"{zone} {usd:.2f}" for zone, usd in sorted(option.usd_spot.items()))
        table.add_row(
            option.type,
            option.gpu or "",
            str(option.vcpus),
            _figure(option.samples_per_second, ",.0f"),
            _figure(option.hours, ".2f"),
            _figure(option.usd_on_demand, ".2f"),
            quota[option.quota_ok],
            spot or "?",
        )
    _print(table)
    for option in options:
        if option.refused:
            click.echo(f"refused: {option.type}: {option.refused}")


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    # Lines wrap in a narrow terminal, but nothing is cut off.
    Console(highlight=False, soft_wrap=True, markup=False, width=300).print(table)


def _figure(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _reservations(config: Config, options: Sequence[Option]) -> list[str]:
    """Return what the figures rest on."""
    told = {option.basis for option in options if not option.refused}
    notes = [f"Hours and $ hold {config.host.setup_minutes:g} minutes of setup, disk and address."]
    if "scaled from a measured run" in told:
        notes.append("Scaled from a run measured here by types' relative speeds, which are estimates (conf/host).")
    if "calibration table" in told:
        notes.append(f"From the calibration table, not from a run: {config.host.calibration.source}.")
    if "unknown" in told:
        notes.append(
            "No speed is known for this network: run `dvc repro train` once, or give --measured TYPE=IMAGES_PER_S."
        )
    return notes


def _epochs(config: Config) -> float:
    """Return the epochs of all trainings of the pipeline: at most, since pruning and early stopping save some."""
    recipe = recipe_of(config)
    total = config.trainer.max_epochs
    for question in config.ablation.questions.values():
        total += question.seeds * sum(arm.trainer.max_epochs for arm in arms(recipe, question).values())
    if config.search.space:
        each = config.search.settings.get("trainer.max_epochs", config.trainer.max_epochs)
        total += config.search.budget.trials * config.search.seeds * each
        total += config.search.refit_seeds * config.trainer.max_epochs
    return total


def _training_images(config: Config) -> int | None:
    """Return how many images are trained on; None where neither the data nor its configuration say."""
    if META.is_file():
        meta = json.loads(META.read_text())
        if meta["name"] == config.data.name:
            return sum(meta["counts"]["train"])
    count = config.data.limit or (config.data.counts or {}).get("train")
    if count is None:
        return None
    return count - (config.data.val_samples or int(count * config.data.val_fraction))


def _measured_here(config: Config) -> list[Measured]:
    """Return the pipeline's own training, if it was of this network and this size of images, on processors."""
    from cnn_tuning.cloud.plan import Measured

    if not (TRAINING.is_file() and LOCK.is_file()):
        return []
    training = json.loads(TRAINING.read_text())
    try:
        trained = load_locked(_Trained)
    except UserError:
        return []
    same = trained.model == config.model and trained.data.image == config.data.image
    if not same or training["device"] != "cpu":
        return []
    return [Measured(training["samples_per_second"], cores=training["threads"])]


def _measured_there(text: str) -> Measured:
    from cnn_tuning.cloud.plan import Measured

    name, _, speed = text.partition("=")
    try:
        return Measured(float(speed), instance_type=name)
    except ValueError:
        raise UserError(f"--measured {text}: must be like g5.xlarge=61000 (images per second)") from None


def run(overrides: Sequence[str], name: str | None, *, yes: bool) -> None:
    """Show the plan, ask, and start a host on the code as it stands; `name`: of an attempt to go on with."""
    from cnn_tuning.cloud import code, inventory
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.launch import launch
    from cnn_tuning.cloud.names import Order, lifetime
    from cnn_tuning.cloud.plan import dearest_per_hour

    config = compose([_of_host(text) for text in overrides])
    host, aws = config.host, Aws(config.host.region)
    options = [found for found in _preflight(config, aws) if not found.refused]
    if not options:
        raise UserError("no type can be taken: the reasons are above")
    lives = lifetime(host.max_hours, host.budget, dearest_per_hour(host, options))
    dollars = lives.total_seconds() / 3600 * dearest_per_hour(host, options)
    where = Path()
    taken = code.snapshot(where)
    changes = ", with uncommitted changes" if taken.changed else ""
    click.echo(f"code: {taken.commit[:12]}{changes}")
    click.echo(
        f"the host ends after {lives.total_seconds() / 3600:.2f} h at the latest, at ${dollars:.2f} at the most"
    )
    if not yes:
        click.confirm("start it?", abort=True)
    order = Order(
        name or _new_name(config.experiment), _owner(), taken.commit, host.budget, inventory.utc_now() + lives
    )
    if not inventory.instances(
        aws, host.project, order.run
    ):  # it would lose the code that it may be about to fetch
        code.upload(aws.client("s3"), where, taken.commit, order.run, str(host.bucket), host.prefix)
    started = launch(aws, host, order, options)
    click.echo(f"run {order.run}: host {started.id}, {started.type} {started.market}"
               + (", which ran already" if started.found else ""))  # fmt: skip
    click.echo(
        f"log and state: s3://{host.bucket}/{host.prefix}/runs/{order.run}/; results: `dvc pull` when it is done"
    )
    click.echo(f"end it: cnn-tuning host down {order.run}")


def _of_host(text: str) -> str:
    if not text.startswith(("host=", "host.")):
        raise UserError(
            f"{text}: a host runs what params.yaml says: put it there; only `host` can be changed here"
        )
    return text


def _preflight(config: Config, aws: Aws) -> list[Option]:
    """Check what a launch needs and print the plan; return its options."""
    from cnn_tuning.cloud.aws import telling
    from cnn_tuning.cloud.launch import resolve_image

    aws.check()
    bucket = _bucket(None, config.host)
    with telling(f"bucket {bucket}"):
        aws.client("s3").head_bucket(Bucket=bucket)
    options = _planned(config, (), aws)
    for option in options:
        if not option.refused:
            resolve_image(aws, config.host, option.type)
    return options


def _new_name(experiment: str) -> str:
    import secrets

    from cnn_tuning.cloud.inventory import utc_now

    about = "".join(c if c.isalnum() else "-" for c in experiment.lower() if c.isascii())[:12].strip("-")
    return f"{utc_now():%m%d-%H%M%S}-{about or 'run'}-{secrets.token_hex(2)}"


def _owner() -> str:
    import getpass

    from cnn_tuning.cloud.aws import hide_account

    return hide_account(getpass.getuser())


def status(overrides: Sequence[str], *, as_json: bool) -> None:
    """Print everything of the project that costs money; exit 1 if something should not be there."""
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.inventory import costly, leftovers, utc_now

    host = compose_sections(Needed, overrides).host
    aws, now = Aws(host.region), utc_now()
    things, notes = costly(aws, host, now)
    runs = {thing.run for thing in things}
    idle = [item for item in leftovers(aws, host.project) if item.run not in runs]
    if as_json:
        rows = [{**asdict(t), "hours": t.hours(now), "usd": t.usd(now)} for t in things]
        told = {"region": host.region, "costs": rows, "leftovers": [asdict(i) for i in idle], "notes": notes}
        click.echo(json.dumps(told, indent=1, default=str))
    else:
        _print_status(host, things, idle, notes, now)
    if idle or any(thing.warnings for thing in things):
        raise click.exceptions.Exit(1)


def _print_status(
    host: HostConfig, things: Sequence[Thing], idle: Sequence[Leftover], notes: Sequence[str], now: datetime
) -> None:
    from cnn_tuning.cloud.aws import hide_account

    if things:
        table = _table("run", "", "", "state", "hours", "$/h", "$ so far", "owner", "ends")
        for thing in things:
            table.add_row(
                *(thing.run, thing.id, thing.what, thing.state, _figure(thing.hours(now), ".2f")),
                *(_figure(thing.per_hour, ".4f"), _figure(thing.usd(now), ".3f")),
                *(hide_account(thing.tags.get("owner", "")), thing.tags.get("expires-at", "")),
            )
        _print(table)
        known = [thing.per_hour for thing in things if thing.per_hour is not None]
        rest = "" if len(known) == len(things) else ", without unknown prices"
        click.echo(f"${sum(known):.4f} per hour{rest}")
    else:
        click.echo(f"nothing of project {host.project} costs money in {host.region}")
    for thing in things:
        for warning in thing.warnings:
            click.echo(
                f"WARNING: {thing.kind} {thing.id} of run {thing.run} {warning}: cnn-tuning host down {thing.run}"
            )
    for item in idle:
        remedy = f"cnn-tuning host down {item.run}"
        click.echo(f"left over of run {item.run}: {item.kind} {item.name} (costs nothing): {remedy}")
    for note in notes:
        click.echo(note)


def down(run: str | None, overrides: Sequence[str], *, every: bool) -> None:
    """End the hosts of a run, or of all runs, and remove what they were made of."""
    from cnn_tuning.cloud import ledger
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.inventory import costly, utc_now
    from cnn_tuning.cloud.names import check_run
    from cnn_tuning.cloud.teardown import all_runs, end_hosts, remove

    if (run is None) == (not every):
        raise UserError("name a run, or give --all (`cnn-tuning host status` names those there are)")
    host = compose_sections(Needed, overrides).host
    aws = Aws(host.region)
    things: list[Thing] = []
    problems: list[str] = []
    try:  # what it cost is worth knowing, not worth failing for
        things = costly(aws, host, utc_now())[0]
    except UserError as error:
        problems.append(str(error))
    end_hosts(aws, host.project, run and check_run(run))
    ended = [thing for thing in things if run in (None, thing.run)]
    ledger.write(ledger.bills(ended, utc_now(), ended=True))
    for name in [run] if run else all_runs(aws, host.project):
        try:
            removed = remove(aws, host.project, name)
        except UserError as error:
            problems.append(str(error))
            continue
        hosts = [f"host {thing.id}" for thing in ended if thing.run == name and thing.kind == "host"]
        click.echo(
            f"{name}: {', '.join([*hosts, *removed]) or 'nothing was left'}{' removed' if hosts + removed else ''}"
        )
    if problems:
        raise UserError("\n".join(problems))
    if every:
        click.echo(f"nothing of project {host.project} is left in {host.region}")


def cost(overrides: Sequence[str], *, as_json: bool) -> None:
    """Print what hosts have cost: those that run, and those that were ended from here."""
    from cnn_tuning.cloud import ledger
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.inventory import costly, utc_now

    host = compose_sections(Needed, overrides).host
    note, running = "", []
    try:
        now = utc_now()
        running = ledger.bills(costly(Aws(host.region), host, now)[0], now)
    except UserError as error:
        note = f"only what was ended from here: {error}"
    entries = [*ledger.read(), *running]
    if as_json:
        click.echo(json.dumps({"hosts": [asdict(entry) for entry in entries], "note": note}, indent=1))
        return
    _print_bills(entries)
    if note:
        click.echo(note)


def _print_bills(entries: Sequence[Bill]) -> None:
    table = _table("run", "host", "", "hours", "$", "")
    for entry in entries:
        usd, ended = _figure(entry.usd, ".3f"), entry.ended or "still runs"
        table.add_row(entry.run, entry.host, entry.what, f"{entry.hours:.2f}", usd, ended)
    if entries:
        _print(table)
    known = [entry.usd for entry in entries if entry.usd is not None]
    rest = "" if len(known) == len(entries) else f" and {len(entries) - len(known)} of unknown price"
    click.echo(f"${sum(known):.3f} for {len(known)} hosts{rest}")


def remote_init(bucket: str | None, overrides: Sequence[str], *, force: bool) -> None:
    """Make the bucket and DVC's remote in it, and print the policies that people and hosts need."""
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.bucket import make

    host = compose_sections(Needed, overrides).host
    name = _bucket(bucket, host)
    url = f"s3://{name}/{host.prefix}/dvc"
    _check_remote(url, force)
    aws = Aws(host.region)
    aws.check()
    new = make(aws, name)
    click.echo(
        f"bucket {name} {'made' if new else 'was there'}: versioned, encrypted, private, TLS only", err=True
    )
    _dvc("remote", "add", "--force", "--default", REMOTE, url)
    _dvc("remote", "modify", REMOTE, "region", host.region)
    # What comes from the remote is hashed again before it is used.
    _dvc("remote", "modify", REMOTE, "verify", "true")
    click.echo(f"DVC remote {REMOTE}: {url} (in .dvc/config: commit it)", err=True)
    click.echo(f"put `host: {{bucket: {name}}}` into params.yaml", err=True)
    remote_policies(name, overrides)


def remote_policies(bucket: str | None, overrides: Sequence[str]) -> None:
    """Print the least-privilege policies as JSON."""
    from cnn_tuning.cloud import policies

    host = compose_sections(Needed, overrides).host
    name = _bucket(bucket, host)
    told = {
        "person": policies.of_person(host.project, name, host.prefix),
        "host": policies.of_host(host.project, "RUN", name, host.prefix),
        "guard": policies.of_guard(host.project, "RUN"),
        "bucket": {"Version": "2012-10-17", "Statement": [policies.of_bucket(name)]},
    }
    click.echo(json.dumps(told, indent=1))


def _bucket(given: str | None, host: HostConfig) -> str:
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
