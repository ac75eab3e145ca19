"""The champion on a SageMaker endpoint, by MLflow's client against moto's server: what SageMaker was asked for.

Not moto's, and so from here: the Pricing API; the endpoint's answer (InvokeEndpoint goes to a real front around
the same model, where moto sends a fixed text); UpdateEndpoint, which moto lacks.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import live as servers
import pytest
from click.testing import Result
from renting import ACCOUNT, REGION, host_config, product

from cnn_tuning.cloud.aws import Aws
from cnn_tuning.errors import UserError
from cnn_tuning.serving.teardown import remove

TRUST = {"Statement": [{"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}}]}
NEEDED = ("serving.endpoint.image=mnist:3", "serving.endpoint.role=endpoints")
NAME = "mnist-classifier"
NOTES = f"{NAME}-model-notes.txt"  # a person's own

Command = Callable[..., Result]


class _Stub(BaseHTTPRequestHandler):
    """Answers GetProducts, and InvokeEndpoint with what a front answers."""

    front: servers.Live
    asked: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "GetProducts" in self.headers.get("X-Amz-Target", ""):
            wanted = {item["Field"]: item["Value"] for item in json.loads(body)["Filters"]}
            known = wanted == {"instanceName": "ml.c5.large", "component": "Hosting", "regionCode": REGION}
            status, text = 200, json.dumps({"FormatVersion": "aws_v1", "PriceList": [product("0.102")] * known})
        else:
            self.asked.append((self.path, json.loads(body)))
            reply = self.front.ask("/invocations", body, self.headers["Content-Type"])
            status, text = reply.status, reply.text
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def client(moto: str) -> Callable[[str], Any]:
    """Return a function that returns clients, always the same: they take longer to make than to use."""
    session = boto3.Session("testing", "testing-secret", region_name=REGION)
    return functools.cache(lambda service: session.client(service, endpoint_url=moto))


@pytest.fixture(scope="module")
def stub(live: servers.Live) -> Iterator[str]:
    handler = type("Stub", (_Stub,), {"front": live, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Stub.asked = handler.asked
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def aws(
    moto: str, client: Callable[[str], Any], stub: str, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Any]]:
    """An account with a versioned bucket, an image in ECR and a role; yield what makes clients, and clean up."""
    import httpx

    httpx.post(f"{moto}/moto-api/reset", trust_env=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", stub)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", stub)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")  # not where the endpoint is to be
    boto3.setup_default_session()  # MLflow's; it would keep the credentials of another test
    _Stub.asked.clear()
    client("s3").create_bucket(Bucket="a-bucket")
    client("s3").put_bucket_versioning(Bucket="a-bucket", VersioningConfiguration={"Status": "Enabled"})
    client("ecr").create_repository(repositoryName="mnist")
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": {"digest": "sha256:" + "0" * 64}, "layers": []}
    client("ecr").put_image(repositoryName="mnist", imageManifest=json.dumps(manifest), imageTag="3")
    client("iam").create_role(RoleName="endpoints", AssumeRolePolicyDocument=json.dumps(TRUST))
    yield client
    boto3.setup_default_session()
    with contextlib.suppress(UserError):  # an endpoint of others stays
        remove(Aws(REGION), NAME, host_config().project, "a-bucket")
        assert there(client)["objects"] in ([], [NOTES])
        assert not any(there(client)[kind] for kind in ("endpoints", "configurations", "models"))


def deployed(command: Command, *more: str) -> Result:
    return command("deploy", "sagemaker", *NEEDED, "--yes", *more)


def there(aws: Callable[[str], Any]) -> dict[str, list[str]]:
    """Return what SageMaker and the bucket hold, old versions and delete markers too."""
    sagemaker = aws("sagemaker")
    objects = aws("s3").list_object_versions(Bucket="a-bucket")
    return {
        "endpoints": [item["EndpointName"] for item in sagemaker.list_endpoints()["Endpoints"]],
        "configurations": [i["EndpointConfigName"] for i in sagemaker.list_endpoint_configs()["EndpointConfigs"]],
        "models": [item["ModelName"] for item in sagemaker.list_models()["Models"]],
        "objects": [i["Key"] for i in (*objects.get("Versions", ()), *objects.get("DeleteMarkers", ()))],
    }


NOTHING: dict[str, list[str]] = {"endpoints": [], "configurations": [], "models": [], "objects": []}


def test_sagemaker_is_asked_for_what_is_configured(
    command: Command, aws: Callable[[str], Any], registry: Any, mlflow_model: Path
) -> None:
    done = deployed(command, "serving.endpoint.instances=3", "serving.max_images=7", f"host.region={REGION}")
    assert done.exit_code == 0, done.output
    sagemaker = aws("sagemaker")
    endpoint = sagemaker.describe_endpoint(EndpointName=NAME)
    told = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
    (variant,) = told["ProductionVariants"]
    assert (variant["InstanceType"], variant["InitialInstanceCount"]) == ("ml.c5.large", 3)
    model = sagemaker.describe_model(ModelName=variant["ModelName"])
    assert model["ExecutionRoleArn"] == f"arn:aws:iam::{ACCOUNT}:role/endpoints"
    container = model["PrimaryContainer"]
    assert container["Image"] == f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/mnist:3"
    assert (
        container["Environment"].items()
        >= {
            "MLFLOW_MODELS_WORKERS": "2",  # conf/serving/sagemaker.yaml
            "CNN_TUNING_MAX_IMAGES": "7",
            "CNN_TUNING_MAX_PIXELS": "50000000",
        }.items()
    )
    key = container["ModelDataUrl"].removeprefix("s3://a-bucket/")
    archive = aws("s3").get_object(Bucket="a-bucket", Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        assert packed.extractfile("MLmodel").read() == (mlflow_model / "MLmodel").read_bytes()  # type: ignore[union-attr]
    for arn in (endpoint["EndpointArn"], model["ModelArn"]):
        tags = {tag["Key"]: tag["Value"] for tag in sagemaker.list_tags(ResourceArn=arn)["Tags"]}
        assert (tags["project"], tags["model"]) == ("cnn-tuning", f"{NAME}/1")
    assert [path for path, _ in _Stub.asked] == [f"/endpoints/{NAME}/invocations"]


def test_price_and_first_answer_are_told_and_recorded(
    command: Command, aws: Callable[[str], Any], registry: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from cnn_tuning.config import TrackingConfig
    from cnn_tuning.tracking.deliver import sync

    done = deployed(command, "serving.endpoint.instances=2")
    output = done.output + "".join(capfd.readouterr())
    assert "$0.204 an hour, $4.90 a day" in output
    seconds = float(re.search(r"first answer ([0-9.]+) s after the command", output)[1])  # type: ignore[index]
    assert ACCOUNT not in output and "testing-secret" not in output
    sync(Path(TrackingConfig(name="", experiment="").spool), None)
    (run,) = registry.search_runs(["1"], "tags.`cnn_tuning.kind` = 'serving'")
    assert run.data.metrics["serving/first_answer_s"] == pytest.approx(seconds, abs=0.06)
    assert run.data.params["serving.endpoint.instances"] == "2"
    assert run.data.tags["serving.where"] == "sagemaker"
    assert ACCOUNT not in str(run.to_dictionary())
    listed = json.loads(command("deploy", "status", "--json").stdout)
    assert [(e["name"], e["status"], e["instances"], e["dollars_per_hour"]) for e in listed] == [
        (NAME, "InService", 2, pytest.approx(0.204))
    ]
    assert "InService" in command("deploy", "status").stdout


def test_down_leaves_nothing_behind(command: Command, aws: Callable[[str], Any], registry: Any) -> None:
    deployed(command)
    aws("s3").put_object(Bucket="a-bucket", Key=NOTES, Body=b"mine")
    assert all(there(aws).values())
    done = command("deploy", "down")
    assert "removed 1 endpoints, 1 configurations, 1 models, 1 objects" in done.output
    assert there(aws) == {**NOTHING, "objects": [NOTES]}
    assert "nothing is there" in command("deploy", "down").output
    assert "no endpoints" in command("deploy", "status").output


def test_a_dry_run_makes_nothing(command: Command, aws: Callable[[str], Any], registry: Any) -> None:
    done = command("deploy", "sagemaker", *NEEDED, "--dry-run", "serving.endpoint.instance_type=ml.g5.xlarge")
    assert "1 × ml.g5.xlarge, models:/mnist-classifier@champion version 1" in done.output
    assert "price unknown (no offer of ml.g5.xlarge in us-east-1)" in done.output
    assert there(aws) == NOTHING


def test_all_that_lacks_is_one_line(
    command: Command, aws: Callable[[str], Any], registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    done = command("deploy", "sagemaker", "--dry-run", "host.bucket=null")
    (line,) = done.output.strip().splitlines()
    for lacking in ("serving.endpoint.image", "serving.endpoint.role", "host.bucket", "no AWS credentials"):
        assert lacking in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["serving.endpoint.image=mnist:4"], "no image mnist:4 in ECR"),
        (["serving.endpoint.image=other"], "no image other:latest in ECR"),
        (["serving.endpoint.role=nobody"], "no role nobody in IAM"),
        (["serving.endpoint.role=hosts"], "does not trust sagemaker"),
        (["serving.endpoint.bucket=missing"], "bucket missing: "),
        (["serving=container"], "serving=container is made for container"),
        (["serving.alias=best"], "alias best not found"),
    ],
)
def test_what_is_not_there_is_one_line(
    command: Command, aws: Callable[[str], Any], registry: Any, changes: list[str], words: str
) -> None:
    aws("iam").create_role(RoleName="hosts", AssumeRolePolicyDocument="{}")
    done = deployed(command, *changes)
    (line,) = done.output.strip().splitlines()
    assert words in line and ACCOUNT not in line
    assert there(aws) == NOTHING


@pytest.mark.slow
def test_an_endpoint_of_others_is_left_alone(command: Command, aws: Callable[[str], Any], registry: Any) -> None:
    deployed(command)
    arn = aws("sagemaker").describe_endpoint(EndpointName=NAME)["EndpointArn"]
    aws("sagemaker").add_tags(ResourceArn=arn, Tags=[{"Key": "project", "Value": "another"}])
    before = there(aws)
    for done in (deployed(command), command("deploy", "down")):
        assert done.exit_code == 1 and "is not of this project" in done.output
    assert there(aws) == before
    assert "no endpoints" in command("deploy", "status").output


@pytest.mark.slow
def test_what_a_failed_deployment_leaves_is_removed(
    command: Command, aws: Callable[[str], Any], registry: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from botocore.exceptions import ClientError

    def refuse(**_: Any) -> None:
        error = {"Code": "ResourceLimitExceeded", "Message": f"The quota of account {ACCOUNT} is 0 Instances."}
        raise ClientError({"Error": error}, "CreateEndpoint")  # type: ignore[typeddict-item]

    session: Any = boto3._get_default_session()
    session.events.register("before-call.sagemaker.CreateEndpoint", refuse)
    done = deployed(command)
    output = done.output + "".join(capfd.readouterr())
    assert done.exit_code == 1 and "ResourceLimitExceeded" in output and ACCOUNT not in output
    assert "`cnn-tuning deploy down` removes it" in output
    assert [bool(names) for names in there(aws).values()] == [False, True, True, True]
    assert "removed 0 endpoints, 1 configurations, 1 models, 1 objects" in command("deploy", "down").output
    assert there(aws) == NOTHING


@pytest.mark.slow  # MLflow waits for 20 s
def test_a_new_champion_takes_the_place_of_the_old(
    command: Command, aws: Callable[[str], Any], registry: Any, mlflow_model: Path
) -> None:
    from moto.sagemaker.models import sagemaker_backends

    def update(params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
        from botocore.awsrequest import AWSResponse

        asked = json.loads(params["body"])
        backend = sagemaker_backends[ACCOUNT][REGION]
        backend.endpoints[asked["EndpointName"]].endpoint_config_name = asked["EndpointConfigName"]
        told = {"EndpointArn": backend.endpoints[asked["EndpointName"]].arn}
        return AWSResponse("", 200, {}, None), told

    deployed(command)
    before = there(aws)
    registry.create_model_version(NAME, str(mlflow_model))
    registry.set_registered_model_alias(NAME, "champion", "2")
    session: Any = boto3._get_default_session()
    session.events.register("before-call.sagemaker.UpdateEndpoint", update)
    done = deployed(command, "serving.endpoint.instances=2")
    assert "there: its model is replaced" in done.output and done.exit_code == 0
    after = there(aws)
    assert after["endpoints"] == before["endpoints"]
    assert len(after["models"]) == len(after["configurations"]) == 1
    assert not set(before["models"]) & set(after["models"])
    told = aws("sagemaker").describe_endpoint_config(EndpointConfigName=after["configurations"][0])
    assert told["ProductionVariants"][0]["InitialInstanceCount"] == 2
    command("deploy", "down")
    assert there(aws) == NOTHING


@pytest.mark.slow
def test_this_machines_proxies_stay_here(
    command: Command, aws: Callable[[str], Any], registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1,secret.example")
    before = dict(os.environ)
    deployed(command)
    (model,) = there(aws)["models"]
    environment = aws("sagemaker").describe_model(ModelName=model)["PrimaryContainer"]["Environment"]
    assert not [name for name in environment if "proxy" in name.lower()]
    assert dict(os.environ) == before
