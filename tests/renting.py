"""An AWS of its own for each test: moto's, a server of prices, which moto lacks, and an order to launch."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from click.testing import CliRunner, Result
from moto import mock_aws

from cnn_tuning.cloud import launch, teardown
from cnn_tuning.cloud.aws import Aws
from cnn_tuning.cloud.names import PATH, Order, as_mapping
from cnn_tuning.cloud.plan import Option
from cnn_tuning.cloud.prices import PRICING_REGION
from cnn_tuning.config import HostConfig, compose
from cnn_tuning.errors import UserError

ROOT = Path(__file__).parents[1]
REGION = "us-east-1"
ACCOUNT = "123456789012"  # moto's
SECRET = "testing-secret"
WHO = ("-c", "user.name=t", "-c", "user.email=t@example.org")
# What a run makes in EC2 besides instances, which moto shows when they are gone.
TAGGED = {
    "describe_addresses": "Addresses",
    "describe_launch_templates": "LaunchTemplates",
    "describe_network_interfaces": "NetworkInterfaces",
    "describe_security_groups": "SecurityGroups",
    "describe_volumes": "Volumes",
}
ON_DEMAND = {"g4dn.xlarge": "0.526", "g5.xlarge": "1.006", "g6.xlarge": "0.8048", "c7i.2xlarge": "0.357"}


def host_config(**changes: Any) -> HostConfig:
    """Return the shipped configuration with a bucket."""
    return replace(_shipped(), **{"bucket": "a-bucket", **changes})


@cache
def _shipped() -> HostConfig:
    return compose(params=None, conf=ROOT / "conf").host


def order(run: str = "run-one", hours: float = 1.0, **changes: Any) -> Order:
    """Return an order for one host."""
    ends = datetime.now(UTC) + timedelta(hours=hours)
    return replace(Order(run, "ann", "0123abc", 2.0, ends), **changes)


def option(name: str = "g5.xlarge", **changes: Any) -> Option:
    """Return a type that may be taken."""
    known = Option(name, "A10G 24 GB", 4, 16, "measured", 1000.0, 1.0, 1.006)
    return replace(known, **changes)


def product(dollars: str, *, unit: str = "Hrs") -> str:
    """Return one product of the price list, in the shape that the Pricing API sends: JSON in a string."""
    sku, offer, rate = "R3F4ZCDPSGM24DNW", "JRTCKXETXF", "6YS6EN2CT7"
    dimension = {
        "unit": unit,
        "endRange": "Inf",
        "description": f"${dollars} per On Demand Linux g5.xlarge Instance Hour",
        "appliesTo": [],
        "rateCode": f"{sku}.{offer}.{rate}",
        "beginRange": "0",
        "pricePerUnit": {"USD": dollars},
    }
    term = {
        "priceDimensions": {f"{sku}.{offer}.{rate}": dimension},
        "sku": sku,
        "effectiveDate": "2026-11-01T00:00:00Z",
        "offerTermCode": offer,
        "termAttributes": {},
    }
    attributes = {"instanceType": "g5.xlarge", "operatingSystem": "Linux", "regionCode": REGION, "vcpu": "4"}
    return json.dumps(
        {
            "product": {"productFamily": "Compute Instance", "attributes": attributes, "sku": sku},
            "serviceCode": "AmazonEC2",
            "terms": {"OnDemand": {f"{sku}.{offer}": term}, "Reserved": {"x": {"priceDimensions": {}}}},
            "version": "20261101000000",
            "publicationDate": "2026-11-01T00:00:00Z",
        }
    )


def answering(**clients: Any) -> Aws:
    """Return an `Aws` that has these clients already, by service with underscores."""
    region = {"pricing": PRICING_REGION}
    named = {name.replace("_", "-"): client for name, client in clients.items()}
    return Aws(REGION, {(name, region.get(name, REGION)): client for name, client in named.items()})


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """No credentials anywhere, and nothing but loopback is spoken to."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "DEFAULT_REGION", "REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # What moto lacks goes nowhere, unless a test brings an answer.
    monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_SERVICE_QUOTAS", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))


@pytest.fixture
def credentials(no_aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that no real account knows."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


class _Prices(BaseHTTPRequestHandler):
    """Answers GetProducts and GetServiceQuota as AWS does."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["X-Amz-Target"].endswith("GetProducts"):
            wanted = {item["Field"]: item["Value"] for item in asked["Filters"]}
            price = ON_DEMAND.get(wanted.get("instanceType", ""))  # endpoints are asked for by another field
            answer: dict[str, Any] = {"FormatVersion": "aws_v1", "PriceList": [product(price)] if price else []}
        else:
            answer = {"Quota": {"QuotaCode": asked["QuotaCode"], "Value": 64.0}}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def _price_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Prices)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def prices(no_aws: None, _price_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices and quotas may be asked."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", _price_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SERVICE_QUOTAS", _price_server)


@pytest.fixture(scope="session")
def _shared() -> Aws:
    """One set of clients for all tests: they take longer to make than to use. Moto forgets between tests."""
    return Aws(REGION)


@pytest.fixture
def aws(_shared: Aws, credentials: None, prices: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    """Moto's account, with the AMIs where the configuration looks for them."""
    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # they take 1.5 s
    monkeypatch.setattr(launch, "PAUSE_S", 0)
    monkeypatch.setattr(teardown, "PAUSE_S", 0)
    asked = Aws.client

    def client(self: Aws, service: str, region: str | None = None) -> Any:
        own = (service, region or self.region) in self._clients
        return asked(self if own else _shared, service, region)

    monkeypatch.setattr(Aws, "client", client)
    with mock_aws():
        yield _shared
        leave_nothing(_shared)


def leave_nothing(aws: Aws) -> None:
    """Remove every run, as a person does in the end, and be sure that nothing of any is left."""
    project = host_config().project
    for run in teardown.all_runs(aws, project):
        teardown.remove(aws, project, run)
    assert teardown.all_runs(aws, project) == []
    ec2, tagged = aws.client("ec2"), [{"Name": "tag-key", "Values": ["project"]}]
    left = [thing for operation, key in TAGGED.items() for thing in getattr(ec2, operation)(Filters=tagged)[key]]
    hosts = [
        item for group in ec2.describe_instances(Filters=tagged)["Reservations"] for item in group["Instances"]
    ]
    left += [item for item in hosts if item["State"]["Name"] != "terminated"]
    left += aws.client("iam").list_roles(PathPrefix=PATH)["Roles"]
    left += aws.client("iam").list_instance_profiles(PathPrefix=PATH)["InstanceProfiles"]
    left += aws.client("scheduler").list_schedules()["Schedules"]
    sagemaker = aws.client("sagemaker")
    for endpoint in sagemaker.list_endpoints()["Endpoints"]:
        tags = as_mapping(sagemaker.list_tags(ResourceArn=endpoint["EndpointArn"])["Tags"])
        left += [endpoint] if tags.get("project") == project else []
    assert left == []


@pytest.fixture
def images(aws: Aws) -> dict[str, str]:
    """Return configuration entries for SSM parameters that hold AMIs known to moto."""
    ec2, ssm = aws.client("ec2"), aws.client("ssm")
    ami = ec2.register_image(Name="ubuntu", RootDeviceName="/dev/sda1")["ImageId"]
    for name in ("/gpu", "/cpu"):
        ssm.put_parameter(Name=name, Value=ami, Type="String")
    return {"gpu_ami": "/gpu", "cpu_ami": "/cpu"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in a project's top folder."""
    place = tmp_path / "project"
    place.mkdir()
    shutil.copytree(ROOT / "conf", place / "conf")
    # Half of the time to compose, and of no interest here.
    (place / "conf/diagnosis/default.yaml").write_text("name: default\n")
    (place / "params.yaml").write_text("experiment: mnist\nhost: {bucket: a-bucket}\n")
    monkeypatch.chdir(place)
    return place


_COMPOSED: dict[str, Any] = {}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs `cnn-tuning` in this process; a `UserError` is in `output`, as it is printed."""
    from cnn_tuning.cli import cli
    from cnn_tuning.config.values import compose_groups

    def composed(choices: Any, conf: Path, problems: list[str]) -> Any:
        """Ask Hydra once for the same choices: that is most of what a command takes."""
        key = repr(choices)
        if key not in _COMPOSED:
            _COMPOSED[key] = compose_groups(choices, conf, problems)
        return copy.deepcopy(_COMPOSED[key])

    monkeypatch.setattr(sys.modules["cnn_tuning.config.compose"], "compose_groups", composed)

    def run(*arguments: str) -> Result:
        done = CliRunner().invoke(cli, arguments)
        if isinstance(done.exception, UserError):
            done.stdout_bytes += f"error: {done.exception}\n".encode()
            done.output_bytes += f"error: {done.exception}\n".encode()
        elif done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert ACCOUNT not in done.output and SECRET not in done.output
        return done

    return run


def intercept(
    client: Any, operation: str, answer: Callable[[dict[str, Any]], dict[str, Any]]
) -> Callable[[], None]:
    """Answer an operation instead of moto; `{"Error": …}` is an error. Return how to stop that."""
    service = client.meta.service_model.service_id.hyphenize()

    def handler(params: dict[str, Any], **_: Any) -> tuple[AWSResponse, dict[str, Any]]:
        parsed = answer(params)
        status = 400 if "Error" in parsed else 200
        return AWSResponse("", status, {}, None), {"ResponseMetadata": {"HTTPStatusCode": status}, **parsed}

    name = f"before-call.{service}.{operation}"
    client.meta.events.register(name, handler)
    return lambda: client.meta.events.unregister(name, handler)


@pytest.fixture
def project(folder: Path, images: dict[str, str]) -> Path:
    """A project with a commit and a DVC remote, whose images are counted; nothing of it was run yet."""
    lines = "experiment: mnist\ndata: {limit: 60000}\nsearch: none\nablation: none\n"
    host = "host: {bucket: a-bucket, gpu_ami: /gpu, cpu_ami: /cpu, candidates: [g5.xlarge, p3.2xlarge]}\n"
    (folder / "params.yaml").write_text(lines + host)
    (folder / ".dvc").mkdir()
    remote = "['remote \"storage\"']\n    url = s3://a-bucket/cnn-tuning/dvc\n    region = us-east-1\n"
    (folder / ".dvc/config").write_text(f"[core]\n    remote = storage\n    analytics = false\n{remote}")
    for arguments in (("init", "-q"), ("add", "-A"), (*WHO, "commit", "-qm", "start")):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder
