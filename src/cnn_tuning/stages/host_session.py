"""`cnn-tuning host logs` and `host tunnel`: what a host says, and its MLflow and Jupyter on ports here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from cnn_tuning.config import compose_sections
from cnn_tuning.errors import UserError
from cnn_tuning.stages.host_tables import Needed

if TYPE_CHECKING:
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.runs import Place
    from cnn_tuning.cloud.session import Port

MLFLOW, JUPYTER = 5000, 8888
NOTEBOOK = "notebooks/cnn_tuning.ipynb"


def logs(run: str, overrides: Sequence[str], *, follow: bool) -> None:
    """Print a run's log, which its host uploads about every minute; `follow`: until the run's host has ended."""
    from cnn_tuning.cloud.aws import Aws, hide_account
    from cnn_tuning.cloud.follow import judge, look_at, pause
    from cnn_tuning.cloud.runs import known_record, place_of

    host = compose_sections(Needed, overrides).host
    aws = Aws(host.region)
    place = place_of(aws, host, run)
    record = known_record(place)
    printed = b""
    while True:
        over = not record.hosts or judge(look_at(aws, place, record.hosts[-1])) != "going"
        body = place.read("boot.log") or b""
        new = body[len(printed) :] if body.startswith(printed) else body  # another host's begins anew
        click.echo(hide_account(new.decode(errors="replace")), nl=False)
        printed = body
        if not follow or over:
            break
        pause()
        record = known_record(place)
    if not printed:
        click.echo("no log yet: a host sends the first one about two minutes after its launch")


def tunnel(run: str, overrides: Sequence[str], ports: Sequence[str], *, ssh: bool) -> None:
    """Hold tunnels to a run's host open until Ctrl-C, or print how plain SSH does it."""
    from cnn_tuning.cloud import session
    from cnn_tuning.cloud.aws import Aws
    from cnn_tuning.cloud.runs import place_of

    pairs = [session.parse_port(text) for text in ports or (str(MLFLOW), str(JUPYTER))]
    host = compose_sections(Needed, overrides).host
    if not ssh:
        session.check_tools()
    aws = Aws(host.region)
    item = _running(aws, host.project, run)
    if ssh:
        address = item.get("PublicDnsName") or item.get("PublicIpAddress") or item["PrivateIpAddress"]
        group = item["SecurityGroups"][0]["GroupId"]
        for line in session.ssh_commands(item["InstanceId"], host.region, address, group, pairs):
            click.echo(line)
        return
    place = place_of(aws, host, run)
    if not ports:
        _check_served(place)
    with session.tunnels(item["InstanceId"], host.region, pairs) as children:
        for port in pairs:
            click.echo(f"port {port.remote} of {item['InstanceId']}: {_address(place, port)}")
        click.echo("Ctrl-C closes it")
        try:
            while all(child.poll() is None for child in children):
                hold(0.5)
        except KeyboardInterrupt:
            click.echo("\nclosed; the host goes on")
            return
    raise UserError("a tunnel was closed from the other side: see `cnn-tuning host status`")


def _check_served(place: Place) -> None:
    """Say so where nothing answers on MLflow's and Jupyter's ports, or not yet."""
    from cnn_tuning.cloud.runs import read_record

    record = read_record(place)
    if record is not None and record.mode == "pipeline":
        raise UserError(
            f"run {place.run} is a pipeline and serves no pages: `cnn-tuning host logs -f {place.run}` follows "
            "it, `cnn-tuning host up` starts a host with MLflow and Jupyter, --port leads to any other port"
        )
    stage = place.read_json("state.json").get("stage", "boot")
    if stage != "ready":
        click.echo(f"the host is not ready yet (stage {stage}): its pages answer when it is")


def hold(seconds: float) -> None:
    """Wait while tunnels are open."""
    time.sleep(seconds)


def _running(aws: Aws, project: str, run: str) -> dict[str, Any]:
    from cnn_tuning.cloud.inventory import instances
    from cnn_tuning.cloud.names import check_run

    found = [item for item in instances(aws, project, check_run(run)) if item["State"]["Name"] == "running"]
    if not found:
        raise UserError(f"no host of run {run} runs: `cnn-tuning host status` names those that do")
    return max(found, key=lambda item: item["LaunchTime"])


def _address(place: Place, port: Port) -> str:
    """Return what to open; Jupyter's token stands in a page that only this user may read, never in output."""
    from cnn_tuning.cloud.results import folder_of

    url = f"http://127.0.0.1:{port.local}/"
    token = place.read("jupyter.token") if port.remote == JUPYTER else None
    if not token:
        return url
    page = folder_of(place.run) / "jupyter.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.unlink(missing_ok=True)
    page.touch(mode=0o600)
    target = f"{url}lab/tree/{NOTEBOOK}?token={quote(token.decode().strip(), safe='')}"
    page.write_text(f'<meta http-equiv="refresh" content="0; url={target}">\n')
    return f"{url}, the notebook opened with its token by {Path(page).resolve().as_uri()}"
