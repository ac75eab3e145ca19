"""The bucket: made private, versioned, encrypted and for TLS only; made so again where it exists already."""

from __future__ import annotations

import json
import re
from typing import Any

from cnn_tuning.cloud.aws import Aws, code_of, telling
from cnn_tuning.cloud.policies import of_bucket
from cnn_tuning.errors import UserError

# Old checkpoints are removed by the hosts; what a versioned bucket keeps of them goes after so many days.
KEPT_DAYS = 7
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def make(aws: Aws, name: str, prefix: str) -> bool:
    """Make the bucket, or harden the one that is there; return whether it is new.

    Versioned: what is overwritten can be got back, of runs below `prefix` for a week. Other statements of its
    policy and other lifecycle rules stay.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"bucket {name!r}: 3 to 63 small letters, digits, hyphens and dots")
    s3 = aws.client("s3")
    with telling(f"bucket {name}"):
        new = _create(s3, name, aws.region)
        s3.put_public_access_block(
            Bucket=name,
            PublicAccessBlockConfiguration={
                "BlockPublicAcls": True,
                "IgnorePublicAcls": True,
                "BlockPublicPolicy": True,
                "RestrictPublicBuckets": True,
            },
        )
        s3.put_bucket_ownership_controls(
            Bucket=name, OwnershipControls={"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
        )
        s3.put_bucket_encryption(
            Bucket=name,
            ServerSideEncryptionConfiguration={
                "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]
            },
        )
        s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        s3.put_bucket_policy(Bucket=name, Policy=json.dumps(_with_tls(s3, name)))
        s3.put_bucket_lifecycle_configuration(
            Bucket=name, LifecycleConfiguration={"Rules": _with_expiry(s3, name, prefix)}
        )
    return new


def _create(s3: Any, name: str, region: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        # Not HeadBucket: that takes the right to list all of the bucket.
        there = s3.get_bucket_location(Bucket=name).get("LocationConstraint") or "us-east-1"
    except ClientError as error:
        if code_of(error) in ("403", "AccessDenied"):
            raise UserError(
                f"bucket {name}: it is of someone else, or closed to you: choose another name"
            ) from None
        if code_of(error) not in ("NoSuchBucket", "404"):
            raise
    else:
        there = {"EU": "eu-west-1"}.get(there, there)  # as buckets of before 2014 are told
        if there != region:
            raise UserError(f"bucket {name} is in {there}: choose another name, or set host.region={there}")
        return False
    # us-east-1 is the default that must not be named.
    where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    s3.create_bucket(Bucket=name, **where)
    return True


def _with_tls(s3: Any, name: str) -> dict[str, Any]:
    from botocore.exceptions import ClientError

    try:
        policy = json.loads(s3.get_bucket_policy(Bucket=name)["Policy"])
    except ClientError as error:
        if code_of(error) != "NoSuchBucketPolicy":
            raise
        policy = {"Version": "2012-10-17", "Statement": []}
    own = of_bucket(name)
    others = [statement for statement in policy["Statement"] if statement.get("Sid") != own["Sid"]]
    return {**policy, "Statement": [*others, own]}


def _with_expiry(s3: Any, name: str, prefix: str) -> list[dict[str, Any]]:
    from botocore.exceptions import ClientError

    try:
        rules = s3.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    except ClientError as error:
        if code_of(error) != "NoSuchLifecycleConfiguration":
            raise
        rules = []
    own = {
        "ID": f"{prefix} runs",
        "Status": "Enabled",
        "Filter": {"Prefix": f"{prefix}/runs/"},
        "NoncurrentVersionExpiration": {"NoncurrentDays": KEPT_DAYS},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": KEPT_DAYS},
    }
    return [*(rule for rule in rules if rule.get("ID") != own["ID"]), own]
