"""A SageMaker endpoint through MLflow's own deployment client: planned, made or brought up to date, asked.

What is lacking is found before anything is made. Names of MLflow's making (`NAME-model-…`, `NAME-config-…`) and
the tag `project` tell later what belongs to an endpoint: see `teardown`.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cnn_tuning.cloud.aws import Aws, code_of
from cnn_tuning.cloud.prices import PRICING_REGION, hourly_prices
from cnn_tuning.config import HostConfig, ServingConfig
from cnn_tuning.errors import UserError
from cnn_tuning.serving.asking import asking, asking_mlflow
from cnn_tuning.serving.container import environment_of
from cnn_tuning.serving.first_answer import picture
from cnn_tuning.serving.server import Named

OWNER = "project"  # the tag by which everything of a project is found again
IMAGE_VARIABLE = "MLFLOW_SAGEMAKER_DEPLOY_IMG_URL"  # MLflow's own
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class Plan:
    """All that a deployment needs. `image` and `role` as configured, until `resolve` makes them whole."""

    endpoint: str
    model: Named
    image: str
    role: str
    bucket: str
    project: str
    instance_type: str
    instances: int
    timeout_s: int
    environment: dict[str, str]


def endpoint_name(serving: ServingConfig, model: str) -> str:
    """Return the endpoint's name: the one configured, or the model's in letters that SageMaker takes."""
    return serving.endpoint.name or re.sub(r"[^a-zA-Z0-9]+", "-", model)[:35].strip("-")


def plan(serving: ServingConfig, host: HostConfig, model: Named, aws: Aws) -> Plan:
    """Return what would be made; raises one `UserError` that names everything that is lacking."""
    wanted = serving.endpoint
    image = wanted.image or os.environ.get(IMAGE_VARIABLE)
    bucket = wanted.bucket or host.bucket
    lacking = []
    if not image:
        lacking.append("serving.endpoint.image (in ECR, such as mnist:3: `cnn-tuning deploy image`, docker push)")
    if not wanted.role:
        lacking.append("serving.endpoint.role (the name of the IAM role that SageMaker takes)")
    if not bucket:
        lacking.append("host.bucket (`cnn-tuning remote init`)")
    try:
        aws.check()
    except UserError as error:
        lacking.append(f"credentials ({str(error).removeprefix('sts: ')})")
    if lacking or not (image and wanted.role and bucket):
        raise UserError(f"cannot deploy: lacking are {'; '.join(lacking)}")
    return Plan(
        endpoint_name(serving, model.name),
        model,
        image,
        wanted.role,
        bucket,
        host.project,
        wanted.instance_type,
        wanted.instances,
        wanted.timeout_s,
        environment_of(serving),
    )


def resolve(plan: Plan, aws: Aws) -> Plan:
    """Return the plan with image and role as AWS takes them; raises `UserError` where one is not there."""
    with asking(f"bucket {plan.bucket}"):
        aws.client("s3").get_bucket_location(Bucket=plan.bucket)  # what a person may ask
    return replace(plan, image=_image(plan.image, aws), role=_role(plan.role, aws))


def _image(image: str, aws: Aws) -> str:
    from botocore.exceptions import ClientError

    if "." in image.partition("/")[0] and "/" in image:
        return image
    repository, _, tag = image.partition(":")
    with asking("ECR"):
        try:
            aws.client("ecr").describe_images(repositoryName=repository, imageIds=[{"imageTag": tag or "latest"}])
        except ClientError as error:
            if code_of(error) not in ("RepositoryNotFoundException", "ImageNotFoundException"):
                raise
            raise UserError(
                f"no image {repository}:{tag or 'latest'} in ECR in {aws.region}: `cnn-tuning deploy image`, "
                "docker tag, docker push"
            ) from None
    return f"{aws.account()}.dkr.ecr.{aws.region}.amazonaws.com/{repository}:{tag or 'latest'}"


def _role(role: str, aws: Aws) -> str:
    from botocore.exceptions import ClientError

    if role.startswith("arn:"):
        return role
    with asking("IAM"):
        try:
            found = aws.client("iam").get_role(RoleName=role)["Role"]
        except ClientError as error:
            if code_of(error) != "NoSuchEntity":
                raise
            raise UserError(f"no role {role} in IAM: make one that trusts sagemaker.amazonaws.com") from None
    if "sagemaker.amazonaws.com" not in json.dumps(found["AssumeRolePolicyDocument"], default=str):
        raise UserError(f"role {role} does not trust sagemaker.amazonaws.com: SageMaker cannot take it")
    return str(found["Arn"])


def hourly_price(aws: Aws, instance_type: str) -> float | None:
    """Return US dollars an hour of one instance that hosts an endpoint; None where there is no such offer."""
    wanted = {"instanceName": instance_type, "component": "Hosting", "regionCode": aws.region}
    filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
    with asking("the Pricing API"):
        answer = aws.client("pricing", PRICING_REGION).get_products(
            ServiceCode="AmazonSageMaker", Filters=filters, MaxResults=100
        )
    return max((price for text in answer["PriceList"] for price in hourly_prices(json.loads(text))), default=None)


def found(aws: Aws, name: str, project: str) -> dict[str, Any] | None:
    """Return what SageMaker says of an endpoint, None where there is none; another project's is refused."""
    from botocore.exceptions import ClientError

    sagemaker = aws.client("sagemaker")
    with asking("SageMaker"):
        try:
            endpoint = dict(sagemaker.describe_endpoint(EndpointName=name))
        except ClientError as error:
            if code_of(error) == "ValidationException" and "Could not find" in str(error):
                return None
            raise
        tags = tags_of(sagemaker, endpoint["EndpointArn"])
    if tags.get(OWNER) != project:
        raise UserError(f"endpoint {name} is not of this project ({OWNER}={project}): set serving.endpoint.name")
    return endpoint


def tags_of(sagemaker: Any, arn: str) -> dict[str, str]:
    """Return the tags of something of SageMaker's."""
    pages = sagemaker.get_paginator("list_tags").paginate(ResourceArn=arn)
    return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}


def deploy(plan: Plan, aws: Aws) -> None:
    """Make the endpoint, or bring model and instances of the one that is there to the plan; waits for it."""
    there = found(aws, plan.endpoint, plan.project)
    if there and there["EndpointStatus"] != "InService":
        state = there["EndpointStatus"]
        raise UserError(f"endpoint {plan.endpoint} is {state}: wait, or `cnn-tuning deploy down` first")
    client = deployment_client(aws.region)
    settings = {
        "execution_role_arn": plan.role,
        "image_url": plan.image,
        "bucket": plan.bucket,
        "instance_type": plan.instance_type,
        "instance_count": plan.instances,
        "timeout_seconds": plan.timeout_s,
        "env": plan.environment,
        "tags": {OWNER: plan.project, "model": f"{plan.model.name}/{plan.model.version}"},
    }
    make = client.update_deployment if there else client.create_deployment
    with asking_mlflow(f"endpoint {plan.endpoint}"), _own_proxies():
        make(plan.endpoint, plan.model.uri, config=settings)


def ask(plan: Plan, aws: Aws) -> str:
    """Send a picture to the endpoint and return the label of its answer."""
    import pandas as pd

    pictures = pd.DataFrame({"image": [base64.b64encode(picture()).decode()]})
    with asking_mlflow(f"endpoint {plan.endpoint}"):
        answer = deployment_client(aws.region).predict(plan.endpoint, pictures)
    try:
        return str(answer["predictions"][0]["label"])
    except (KeyError, IndexError, TypeError):
        raise UserError(f"endpoint {plan.endpoint}: answers, but not as this project's models do") from None


def deployment_client(region: str) -> Any:
    """Return MLflow's client of SageMaker in a region."""
    from mlflow.deployments import get_deploy_client

    logging.getLogger("mlflow.sagemaker").setLevel(logging.ERROR)  # it tells ARNs, which hold the account's number
    return get_deploy_client(f"sagemaker:/{region}")


@contextmanager
def _own_proxies() -> Iterator[None]:
    """Keep this machine's proxies, and any password in them, out of the endpoint's environment.

    MLflow copies `http_proxy` and its like from here into the model. boto3 reads the names in capitals, too.
    """
    moved = {name: os.environ.pop(name) for name in _PROXIES if name in os.environ}
    added = {name.upper(): value for name, value in moved.items() if name.upper() not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.update(moved)
        for name in added:
            del os.environ[name]
