"""`cnn-tuning …`: the commands that are not DVC stages. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnn_tuning.stages.command import run_command

if TYPE_CHECKING:
    from cnn_tuning.config import Config


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cnn-tuning")
def cli() -> None:
    """Train, diagnose, tune, evaluate, register and serve image classifiers, reproducibly.

    The pipeline itself is run by `dvc repro`, or `make repro` on a fresh machine.
    """


@cli.command()
def summary() -> None:
    """Show the last result: accuracy, time, report, registered model, and what to try next."""
    from cnn_tuning.reports.summary import print_summary

    print_summary(Path("results"))


@cli.command()
@click.option("--locks", is_flag=True, help="Only DVC's lock files; nothing where they are in order and free.")
def doctor(locks: bool) -> None:
    """Check Python, disk, GPU and driver, tracking store, data remote, DVC's locks; exit 1 if one is bad."""
    from cnn_tuning.doctor import print_checks

    raise click.exceptions.Exit(0 if print_checks(locks=locks) else 1)


@cli.command("stand-in")
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="Default: where conf/data/NAME.yaml looks for it.")
@click.option("--share", default=1.0, show_default=True, help="How much of the real data set's counts.")
@click.option("--seed", default=0, show_default=True)
def stand_in(name: str, out: Path | None, share: float, seed: int) -> None:
    """Draw an archive of a data set's layout, counts and file kinds, where the real one is out of reach.

    NAME: dog_breeds, cifar10 or cifar10_python.
    """
    from cnn_tuning.stages.initialise import make_stand_in

    make_stand_in(name, out, share, seed)


@cli.command()
@click.argument("path")
@click.option("--name", help="Of the experiment (default: the folder's name).")
@click.option("--size", type=int, help="Side of the network's input in pixels (default: chosen by the pictures).")
@click.option("--out", type=click.Path(path_type=Path), help="For the data sheet (default: scratch/init/NAME).")
@click.option("--force", is_flag=True, help="Replace an experiment of this name.")
def init(path: str, name: str | None, size: int | None, out: Path | None, force: bool) -> None:
    """Look at your own pictures and write an experiment for them, with a data sheet.

    PATH: a folder, a zip or tar archive, or s3://bucket/prefix/, with a folder for each class.
    """
    from cnn_tuning.stages.initialise import init as initialise

    initialise(path, name=name, size=size, sheet=out, force=force)


@cli.command()
@click.argument("destination", metavar="FOLDER|s3://BUCKET/PREFIX")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path("data/prepared"),
    show_default=True,
    help="The prepared data set.",
)
@click.option(
    "--shard-mb",
    type=click.FloatRange(min=0.001),
    default=16.0,
    show_default=True,
    help="Size of a shard: several to a batch mix best.",
)
def shard(destination: str, data: Path, shard_mb: float) -> None:
    """Write the prepared training split as shards, which trainer.stream reads; interrupted, it goes on."""
    from cnn_tuning.stages.shard import shard as write

    write(destination, data, shard_mb)


@cli.command()
@click.option("--master", required=True, metavar="HOST:PORT", help="Where the training is led, as it says itself.")
@click.option("--node-rank", type=int, required=True, help="Which of the machines this is: 1, 2, …")
@click.option("--data", type=click.Path(path_type=Path), default=Path("data/prepared"), show_default=True)
@click.option(
    "--wait", "wait_s", default=600.0, show_default=True, help="Seconds to wait for the leading machine."
)
def join(master: str, node_rank: int, data: Path, wait_s: float) -> None:
    """Take part, with this machine's devices, in a training of several machines (trainer.num_nodes)."""
    from cnn_tuning.stages.join import join as take_part

    take_part(master, node_rank, data, wait_s)


@cli.command("train-on-ray")
@click.argument("overrides", nargs=-1)
@click.option("--workers", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--address", help="A cluster's: auto or HOST:PORT (default: a Ray of this machine).")
@click.option("--cpus", type=float, default=1.0, show_default=True, help="Of each worker.")
@click.option("--gpus", type=click.IntRange(0, 1), default=0, show_default=True, help="Of each worker.")
@click.option(
    "--retries", default=2, show_default=True, help="How often all begin again, from the last checkpoint."
)
@click.option("--data", type=click.Path(path_type=Path), default=Path("data/prepared"), show_default=True)
@click.option("--outputs", type=click.Path(path_type=Path), default=Path("scratch"), show_default=True)
def train_on_ray(
    overrides: tuple[str, ...],
    workers: int,
    address: str | None,
    cpus: float,
    gpus: int,
    retries: int,
    data: Path,
    outputs: Path,
) -> None:
    """Train one network by several workers that Ray places, one device each.

    OVERRIDES: as for the stage `train`, such as experiment=mnist.
    """
    from cnn_tuning.config import RayConfig
    from cnn_tuning.stages.ray_training import train

    ray = RayConfig(cpus, float(gpus), address)
    train(overrides, ray, workers=workers, retries=retries, data=data, out=outputs)


@cli.command()
@click.argument("model")
def show(model: str) -> None:
    """Show where a registered model comes from: commit, data, configuration, metrics, gate.

    MODEL is such as models:/mnist-classifier@champion.
    """
    from cnn_tuning.tracking.lineage import describe, lineage

    click.echo(describe(lineage(model, _composed().tracking)))


@cli.command()
@click.argument("model")
def promote(model: str) -> None:
    """Move the champion's alias by hand to MODEL, such as models:/mnist-classifier/3."""
    from cnn_tuning.tracking.registry import promote as move

    composed = _composed()
    click.echo(move(model, composed.registry.alias, composed.tracking))


@cli.command()
@click.argument("spool", type=click.Path(path_type=Path, exists=True, file_okay=False), required=False)
@click.option("--to", "uri", help="The MLflow store to deliver to (default: where each run was meant to go).")
def sync(spool: Path | None, uri: str | None) -> None:
    """Deliver runs that were recorded while the tracking server was away. SPOOL: the folder that holds them."""
    from cnn_tuning.tracking.deliver import sync as deliver

    synced = deliver(spool or Path(_composed().tracking.spool), uri)
    for run in synced:
        click.echo(f"{run.state:<9} {run.name}: {run.message}")
    if not synced:
        click.echo("nothing to deliver")
    if any(run.state == "failed" for run in synced):
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("source")
@click.option("--model", default=None, help="A registered model or a folder (default: the champion).")
@click.option(
    "--out",
    "--output",
    "out",
    help="The CSV (default: predictions.csv; for one picture, the terminal), or s3://bucket/prefix for parts.",
)
@click.option("--label", help="The true class of one picture (default: its folder's name, if it is a class).")
@click.option("--top-k", default=1, show_default=True, help="How many classes to name for each picture.")
@click.option("--batch-size", default=256, show_default=True)
@click.option(
    "--part-size", default=10_000, show_default=True, help="Pictures in a part below s3://bucket/prefix."
)
def predict(
    source: str,
    model: str | None,
    out: str | None,
    label: str | None,
    top_k: int,
    batch_size: int,
    part_size: int,
) -> None:
    """Classify a picture, or a folder of them or those below an s3:// prefix into a CSV.

    Of one picture all classes are printed with their probabilities, the most probable first. From one s3://
    prefix into another: parts, which a second run does not make again.
    """
    from cnn_tuning.serving.batch import predict_folder
    from cnn_tuning.serving.one import print_prediction
    from cnn_tuning.serving.parts import identity, predict_prefix
    from cnn_tuning.serving.predictor import Predictor, fastest_device
    from cnn_tuning.serving.server import find, is_uri
    from cnn_tuning.serving.settings import Registered, champion, settings
    from cnn_tuning.tracking.store import tracking_uri

    if model and not is_uri(model):
        served = find(model)
    else:
        own = settings(Registered)
        served = find(model or champion(own.serving, own.registry), tracking_uri(own.tracking))
    alone = out is None and Path(source).is_file()
    predictor = Predictor(served.bundle, device="cpu" if alone else fastest_device())
    by = f"{served.name} version {served.version}"
    if alone:
        print_prediction(predictor, Path(source), label, by)
        return
    if out and out.startswith("s3://"):
        told = predict_prefix(predictor, identity(served), source, out, top_k=top_k, batch_size=batch_size,
                              part_size=part_size)  # fmt: skip
        click.echo(f"{out}: {told.describe()} by {by}")
        return
    done = predict_folder(predictor, source, Path(out or "predictions.csv"), top_k=top_k, batch_size=batch_size)
    unread = f", {done.unreadable:,} unreadable (named there)" if done.unreadable else ""
    pictures = "1 picture" if done.predicted == 1 else f"{done.predicted:,} pictures"
    click.echo(f"{out or 'predictions.csv'}: {pictures} classified by {by}{unread}")


@cli.command()
@click.option("--model", default=None, help="A registered model or a folder (default: the champion).")
@click.argument("overrides", nargs=-1)
def serve(model: str | None, overrides: tuple[str, ...]) -> None:
    """Answer over HTTP. OVERRIDES change the section `serving`, such as serving.port=9000."""
    from cnn_tuning.stages.serve import serve as answer

    answer(model, overrides)


@cli.group()
def deploy() -> None:
    """Bring the champion to where it answers others: a SageMaker endpoint, or an image."""


@deploy.command("sagemaker")
@click.argument("overrides", nargs=-1)
@click.option(
    "--dry-run", is_flag=True, help="Check everything, show what would be made and its price, make nothing."
)
@click.option("--yes", is_flag=True, help="Ask nothing.")
def deploy_sagemaker(overrides: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Make a SageMaker endpoint of the champion, or bring the champion to the one that is there.

    OVERRIDES: of the sections `serving` and `host`, such as serving.endpoint.instances=2 host.region=eu-west-1.
    """
    from cnn_tuning.stages.deploy import sagemaker

    sagemaker(overrides, dry_run=dry_run, yes=yes)


@deploy.command("status")
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True)
def deploy_status(overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the endpoints of this project and what they cost."""
    from cnn_tuning.stages.deploy import status

    status(overrides, as_json=as_json)


@deploy.command("down")
@click.argument("overrides", nargs=-1)
def deploy_down(overrides: tuple[str, ...]) -> None:
    """Remove the endpoint and all that was made for it; may be repeated."""
    from cnn_tuning.stages.deploy import down

    down(overrides)


@deploy.command("image")
@click.argument("overrides", nargs=-1)
@click.option("--model", help="A registered model or a saved one's folder (default: the champion).")
@click.option("--context", type=click.Path(path_type=Path), help="Write Dockerfile and model here; build nothing.")
def deploy_image(overrides: tuple[str, ...], model: str | None, context: Path | None) -> None:
    """Build a Docker image that answers with the champion.

    OVERRIDES: of the section `serving`, such as serving.container.image=mnist:3.
    """
    from cnn_tuning.stages.deploy import image

    image(overrides, model, context)


@cli.command()
@click.argument("run", default="models/baseline")
@click.argument("overrides", nargs=-1)
@click.option("--data", type=click.Path(path_type=Path), default=Path("data/prepared"), show_default=True,
              help="For a range test, where the learning rate is in doubt.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def diagnose(run: str, overrides: tuple[str, ...], data: Path, as_json: bool) -> None:
    """Ask every rule about a recorded training. RUN: a model's folder or a run's id.

    OVERRIDES change thresholds, such as diagnosis.rules.class_imbalance.thresholds.ratio=5.
    """
    from cnn_tuning.stages.diagnosing import diagnose_run

    diagnose_run(run, overrides, data, as_json=as_json)


@cli.command()
@click.argument("run", default="models/baseline")
@click.argument("overrides", nargs=-1)
@click.option("--rule", help="Which finding to cure (default: the first that has a remedy).")
@click.option("--seeds", default=3, show_default=True, help="Trainings of each kind.")
@click.option("--workers", default=1, show_default=True, help="Trainings side by side.")
@click.option("--data", type=click.Path(path_type=Path), default=Path("data/prepared"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("scratch/cure"), show_default=True)
def cure(
    run: str, overrides: tuple[str, ...], rule: str | None, seeds: int, workers: int, data: Path, out: Path
) -> None:
    """Try a finding's remedy: train with and without it, same seeds, and say whether it helped.

    RUN: a model's folder or a run's id. OVERRIDES change thresholds, as for `diagnose`.
    """
    from cnn_tuning.stages.diagnosing import cure_run

    cure_run(run, overrides, data, out, rule=rule, seeds=seeds, workers=workers)


@cli.command()
def verify() -> None:
    """Train again in a scratch folder and compare every byte with dvc.lock; exit 1 if one differs."""
    from cnn_tuning.stages.verify import verify as compare

    compare()


@cli.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--commit", help="Of this commit (default: the present one).")
@click.option("--all", "every", is_flag=True, help="Of all commits.")
@click.option("--experiment", help="Of this experiment only, such as mnist.")
@click.option("--csv", "to_csv", type=click.Path(path_type=Path, dir_okay=False), help="Write a CSV, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def compare(
    runs: tuple[str, ...],
    commit: str | None,
    every: bool,
    experiment: str | None,
    to_csv: Path | None,
    as_json: bool,
) -> None:
    """Show runs side by side: host, device, accuracy with its interval, time, samples/s, dollars.

    RUN: an id, its first characters, or a name; without any, all runs of the present commit.
    """
    from cnn_tuning.stages.compare import compare as compare_runs

    compare_runs(runs, commit=commit, every=every, experiment=experiment, to_csv=to_csv, as_json=as_json)


@cli.group()
def host() -> None:
    """Rent EC2 hosts: what they would cost, runs on them and their results, and how to be rid of them."""


@host.command("plan")
@click.argument("overrides", nargs=-1)
@click.option(
    "--measured", multiple=True, metavar="TYPE=IMAGES_PER_S", help="A speed that was measured on a type."
)
@click.option("--nodes", metavar="1,2,4", help="What so many hosts of the best type would make of one training.")
@click.option("--json", "as_json", is_flag=True)
def host_plan(overrides: tuple[str, ...], measured: tuple[str, ...], nodes: str | None, as_json: bool) -> None:
    """Rank host types for this experiment by dollars and time. OVERRIDES, such as host=cpu host.budget=1."""
    if nodes is not None:
        from cnn_tuning.stages.host_nodes import plan_nodes

        plan_nodes(overrides, measured, nodes, as_json=as_json)
        return
    from cnn_tuning.stages.hosting import plan

    plan(overrides, measured, as_json=as_json)


@host.command("run")
@click.argument("overrides", nargs=-1)
@click.option("--budget", type=float, help="US dollars for all hosts of the run (host.budget).")
@click.option("--max-hours", type=float, help="For all hosts of the run (host.max_hours).")
@click.option("--on-demand", is_flag=True, help="No spot host (host.market=on-demand).")
@click.option("--experiment", help="Send this one; params.yaml here, and what else it says, stays as it is.")
@click.option("--run", "name", help="Go on with a run: follow, replace its host, or bring its results.")
@click.option(
    "--measured", multiple=True, metavar="TYPE=IMAGES_PER_S", help="A speed that was measured on a type."
)
@click.option("--detach", is_flag=True, help="Start it and come back; --run follows it later.")
@click.option("--yes", is_flag=True, help="Ask nothing.")
def host_run(
    overrides: tuple[str, ...],
    budget: float | None,
    max_hours: float | None,
    on_demand: bool,
    experiment: str | None,
    name: str | None,
    measured: tuple[str, ...],
    detach: bool,
    yes: bool,
) -> None:
    """Show the plan, ask, start a host that runs the pipeline on the code as it stands, and bring its results.

    OVERRIDES: of the section `host` only, such as host.budget=1; everything else is what params.yaml says.
    Ctrl-C leaves the host at work.
    """
    from cnn_tuning.stages.host_run import Wish, run

    given = (*overrides, *_options_of_host(budget, max_hours, on_demand))
    run(Wish(given, experiment=experiment, name=name, yes=yes, measured=measured), detach=detach)


@host.command("up")
@click.argument("overrides", nargs=-1)
@click.option("--budget", type=float, help="US dollars (host.budget).")
@click.option("--max-hours", type=float, help="How long it may live (host.max_hours).")
@click.option("--on-demand", is_flag=True, help="No spot host (host.market=on-demand).")
@click.option("--run", "name", help="A name, or one that was started already.")
@click.option("--yes", is_flag=True, help="Ask nothing.")
def host_up(
    overrides: tuple[str, ...],
    budget: float | None,
    max_hours: float | None,
    on_demand: bool,
    name: str | None,
    yes: bool,
) -> None:
    """Start a host to work on by hand, with MLflow and Jupyter for `host tunnel`; it runs no pipeline.

    It ends like any other: idle, at its time, at its budget, or by `host down`.
    """
    from cnn_tuning.stages.host_run import Wish, run

    given = (*overrides, *_options_of_host(budget, max_hours, on_demand))
    run(Wish(given, name=name, mode="interactive", yes=yes))


@host.command("cluster")
@click.argument("overrides", nargs=-1)
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="At most so many.")
@click.option("--type", "worker", help="The workers' type (default: the first of host.candidates that fits).")
@click.option("--head", help="The head's type (default: the smallest without a GPU).")
@click.option("--run", "name", help="A name for it.")
def host_cluster(
    overrides: tuple[str, ...], workers: int, worker: str | None, head: str | None, name: str | None
) -> None:
    """Write what `ray up` needs for a Ray cluster of spot hosts, guarded as single hosts are; start nothing.

    OVERRIDES: of the section `host` only, such as host.budget=5.
    """
    from cnn_tuning.stages.host_cluster import cluster

    cluster(overrides, workers=workers, worker=worker, head=head, name=name)


@host.command("logs")
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until its host has ended.")
@click.option("--set", "overrides", multiple=True, help="An override, such as host.region=eu-west-1.")
def host_logs(run: str, follow: bool, overrides: tuple[str, ...]) -> None:
    """Print what a run's host has done, about a minute behind it."""
    from cnn_tuning.stages.host_session import logs

    logs(run, overrides, follow=follow)


@host.command("pull")
@click.argument("run")
@click.option("--set", "overrides", multiple=True, help="An override, such as host.region=eu-west-1.")
def host_pull(run: str, overrides: tuple[str, ...]) -> None:
    """Bring here what a run has left: MLflow runs, dvc.lock, models and metrics; may be repeated."""
    from cnn_tuning.stages.host_results import pull

    pull(run, overrides)


@host.command("tunnel")
@click.argument("run")
@click.option(
    "--port", "ports", multiple=True, metavar="[HERE:]THERE", help="Default: 5000 (MLflow), 8888 (Jupyter)."
)
@click.option("--ssh", is_flag=True, help="Print the commands that do it by plain SSH instead.")
@click.option("--set", "overrides", multiple=True, help="An override, such as host.region=eu-west-1.")
def host_tunnel(run: str, ports: tuple[str, ...], ssh: bool, overrides: tuple[str, ...]) -> None:
    """Open a host's MLflow and Jupyter here through Session Manager, until Ctrl-C; no key, no open port."""
    from cnn_tuning.stages.host_session import tunnel

    tunnel(run, overrides, ports, ssh=ssh)


@host.command("status")
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True)
def host_status(overrides: tuple[str, ...], as_json: bool) -> None:
    """Show everything of this project that costs money now; exit 1 if something should not be there."""
    from cnn_tuning.stages.host_list import status

    status(overrides, as_json=as_json)


@host.command("down")
@click.argument("run", required=False)
@click.option("--all", "every", is_flag=True, help="Of all runs.")
@click.option("--set", "overrides", multiple=True, help="An override, such as host.region=eu-west-1.")
def host_down(run: str | None, every: bool, overrides: tuple[str, ...]) -> None:
    """End the hosts of a run and remove what they were made of; may be repeated."""
    from cnn_tuning.stages.host_list import down

    down(run, overrides, every=every)


@host.command("cost")
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True)
def host_cost(overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what hosts have cost, those that ended by themselves included."""
    from cnn_tuning.stages.host_list import cost

    cost(overrides, as_json=as_json)


@cli.group()
def remote() -> None:
    """Set up the S3 bucket for data, models and hosts."""


@remote.command("init")
@click.argument("bucket", required=False)
@click.option("--force", is_flag=True, help="Replace a DVC remote that leads elsewhere.")
@click.option("--set", "overrides", multiple=True, help="An override, such as host.region=eu-west-1.")
def remote_init(bucket: str | None, force: bool, overrides: tuple[str, ...]) -> None:
    """Make a private, versioned, encrypted bucket and DVC's remote in it; print the policies needed."""
    from cnn_tuning.stages.remote import init as init_remote

    init_remote(bucket, overrides, force=force)


@remote.command("policies")
@click.argument("bucket", required=False)
@click.option("--set", "overrides", multiple=True, help="An override, such as host.prefix=mine.")
def remote_policies(bucket: str | None, overrides: tuple[str, ...]) -> None:
    """Print the least-privilege policies of person, host, guard and bucket as JSON; asks AWS nothing."""
    from cnn_tuning.stages.remote import print_policies as policies

    policies(bucket, overrides)


def _composed(overrides: tuple[str, ...] = ()) -> Config:
    from cnn_tuning.config import compose

    return compose(overrides)


def _options_of_host(budget: float | None, max_hours: float | None, on_demand: bool) -> list[str]:
    """Return the overrides that these options stand for."""
    given = {"host.budget": budget, "host.max_hours": max_hours, "host.market": "on-demand" if on_demand else None}
    return [f"{name}={value}" for name, value in given.items() if value is not None]


def main() -> None:
    """Run the command line."""
    run_command(cli)
