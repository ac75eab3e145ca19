"""The endpoints of a project in, what they cost out; and the removal of one with all that was made for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from cnn_tuning.cloud.aws import Aws, code_of
from cnn_tuning.serving.asking import asking, asking_mlflow
from cnn_tuning.serving.sagemaker import OWNER, deployment_client, found, hourly_price, tags_of

APP = "app_name"  # the tag that MLflow gives a configuration: the endpoint's name
_MADE = re.compile(r"[0-9a-f]{20}")  # what ends the names that MLflow makes


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that is there; `dollars_per_hour` None: unknown."""

    name: str
    status: str
    model: str
    instance_type: str
    instances: int
    hours: float
    dollars_per_hour: float | None


@dataclass(frozen=True)
class Removed:
    """How many of each were removed; `objects` with all their versions."""

    endpoints: int
    configurations: int
    models: int
    objects: int


def endpoints(aws: Aws, project: str) -> list[Endpoint]:
    """Return the endpoints of a project in this region."""
    sagemaker = aws.client("sagemaker")
    there = []
    with asking("SageMaker"):
        for page in sagemaker.get_paginator("list_endpoints").paginate():
            for item in page["Endpoints"]:
                tags = tags_of(sagemaker, item["EndpointArn"])
                if tags.get(OWNER) == project:
                    there.append(
                        _endpoint(aws, sagemaker.describe_endpoint(EndpointName=item["EndpointName"]), tags)
                    )
    return there


def _endpoint(aws: Aws, told: dict[str, Any], tags: dict[str, str]) -> Endpoint:
    from cnn_tuning.errors import UserError

    configuration = aws.client("sagemaker").describe_endpoint_config(EndpointConfigName=told["EndpointConfigName"])
    variant = configuration["ProductionVariants"][0]
    kind, count = variant["InstanceType"], int(variant["InitialInstanceCount"])
    try:
        price = hourly_price(aws, kind)
    except UserError:
        price = None
    hours = (datetime.now(UTC) - told["CreationTime"]).total_seconds() / 3600
    return Endpoint(
        told["EndpointName"],
        told["EndpointStatus"],
        tags.get("model", "?"),
        kind,
        count,
        hours,
        None if price is None else price * count,
    )


def remove(aws: Aws, name: str, project: str, bucket: str | None) -> Removed:
    """Remove an endpoint and what was made for it, also what an interrupted deployment or removal left.

    MLflow's client removes the endpoint, its configuration and its models; then what is left of them by name, and
    the versions that a versioned bucket keeps of the models' archives.

    Raises:
        UserError: the endpoint is of another project, or still there.
    """
    sagemaker = aws.client("sagemaker")
    endpoint = found(aws, name, project)
    with asking("SageMaker"):
        configurations, models = _configurations(sagemaker, name), _models(sagemaker, name, project)
    if endpoint is not None:
        try:
            with asking_mlflow(f"endpoint {name}"):
                deployment_client(aws.region).delete_deployment(name)
        except Exception:
            # MLflow stops at a part that is gone already; what matters is the endpoint, and the rest follows.
            if found(aws, name, project) is not None:
                raise
    with asking("SageMaker"):
        for left in _configurations(sagemaker, name):
            sagemaker.delete_endpoint_config(EndpointConfigName=left)
        for left in _models(sagemaker, name, project):
            sagemaker.delete_model(ModelName=left)
    buckets = set(models.values()) | ({bucket} if bucket else set())
    objects = sum(_empty(aws.client("s3"), place, name) for place in sorted(buckets))
    return Removed(int(endpoint is not None), len(configurations), len(models), objects)


def _configurations(sagemaker: Any, name: str) -> list[str]:
    """Return the configurations that MLflow made for an endpoint."""
    names = []
    for item in _listed(sagemaker, "list_endpoint_configs", "EndpointConfigs", f"{name}-config-"):
        own = _MADE.fullmatch(item["EndpointConfigName"].removeprefix(f"{name}-config-"))
        if own and tags_of(sagemaker, item["EndpointConfigArn"]).get(APP) == name:
            names.append(item["EndpointConfigName"])
    return names


def _models(sagemaker: Any, name: str, project: str) -> dict[str, str]:
    """Return the models that MLflow made for an endpoint, and the bucket of each."""
    buckets = {}
    for item in _listed(sagemaker, "list_models", "Models", f"{name}-model-"):
        own = _MADE.fullmatch(item["ModelName"].removeprefix(f"{name}-model-"))
        if own and tags_of(sagemaker, item["ModelArn"]).get(OWNER) == project:
            told = sagemaker.describe_model(ModelName=item["ModelName"])
            buckets[item["ModelName"]] = urlsplit(told["PrimaryContainer"]["ModelDataUrl"]).netloc
    return buckets


def _listed(sagemaker: Any, operation: str, key: str, part: str) -> list[dict[str, Any]]:
    pages = sagemaker.get_paginator(operation).paginate(NameContains=part)
    return [item for page in pages for item in page[key]]


def _empty(s3: Any, bucket: str, name: str) -> int:
    """Remove every version of the models' archives; return of how many objects."""
    from botocore.exceptions import ClientError

    before, after = f"{name}-model-", "/model.tar.gz"
    keys = set()
    with asking(f"bucket {bucket}"):
        try:
            for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=before):
                for item in (*page.get("Versions", ()), *page.get("DeleteMarkers", ())):
                    if _MADE.fullmatch(item["Key"].removeprefix(before).removesuffix(after)):
                        s3.delete_object(Bucket=bucket, Key=item["Key"], VersionId=item["VersionId"])
                        keys.add(item["Key"])
        except ClientError as error:
            if code_of(error) != "NoSuchBucket":
                raise
    return len(keys)
