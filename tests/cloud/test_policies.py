"""The policy that `remote policies` prints for a person: whatever the commands ask of AWS, it allows."""

from __future__ import annotations

import json
import os
import subprocess
from fnmatch import fnmatchcase

import pytest
from played_host import BUCKET, RUN, ends_well
from project import BIN, ROOT
from renting import ACCOUNT, REGION, host_config

from cnn_tuning.cloud.bucket import make
from cnn_tuning.cloud.names import PATH
from cnn_tuning.cloud.policies import of_person

SERVICES = ("ec2", "iam", "pricing", "s3", "scheduler", "service-quotas", "ssm", "sts")
# Where the right is not called as the operation is; from AWS's Service Authorization Reference.
RIGHTS = {
    "s3:ListObjectsV2": "s3:ListBucket",
    "s3:HeadBucket": "s3:ListBucket",
    "s3:HeadObject": "s3:GetObject",
    "s3:GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "s3:PutBucketLifecycleConfiguration": "s3:PutLifecycleConfiguration",
    "s3:GetBucketEncryption": "s3:GetEncryptionConfiguration",
    "s3:PutBucketEncryption": "s3:PutEncryptionConfiguration",
    "s3:PutPublicAccessBlock": "s3:PutBucketPublicAccessBlock",
}


def resource(right, params):
    """Return what a call is about, None where that is for EC2's tags to say."""
    service = right.partition(":")[0]
    if service == "s3":
        return f"arn:aws:s3:::{params['Bucket']}" + (f"/{params['Key']}" if "Key" in params else "")
    if service == "iam" and "InstanceProfileName" in params:
        return f"arn:aws:iam::{ACCOUNT}:instance-profile{PATH}{params['InstanceProfileName']}"
    if service == "iam" and "RoleName" in params:
        return f"arn:aws:iam::{ACCOUNT}:role{PATH}{params['RoleName']}"
    if service == "scheduler" and "Name" in params:
        return f"arn:aws:scheduler:{REGION}:{ACCOUNT}:schedule/default/{params['Name']}"
    return None


def allows(statement, right, params):
    def some(patterns, text):
        listed = patterns if isinstance(patterns, list) else [patterns]
        return any(fnmatchcase(text, pattern) for pattern in listed)

    about = resource(right, params)
    prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix")
    return (
        some(statement["Action"], right)
        and (about is None or some(statement["Resource"], about))
        and (prefixes is None or some(prefixes, params.get("Prefix", "")))
    )


@pytest.fixture
def asked(aws):
    """Every right that is used from here on, with the call's arguments."""
    calls = []

    def note(params, model, **_):
        prefix = {"service-quotas": "servicequotas"}.get(
            service := model.service_model.service_id.hyphenize(), service
        )
        calls.append((f"{prefix}:{model.name}", params))

    clients = [aws.client(name, "us-east-1") for name in SERVICES]
    for client in clients:
        client.meta.events.register("provide-client-params", note)
    yield calls
    for client in clients:
        client.meta.events.unregister("provide-client-params", note)


def test_a_person_may_do_what_the_commands_do(aws, project, command, played, asked):
    played.plays(played.tells("started"), played.gone(), *ends_well(played))
    assert command("host", "run", "--yes", "--run", RUN).exit_code == 0
    for arguments in (("status",), ("cost",), ("logs", RUN), ("pull", RUN), ("down", "--all")):
        done = command("host", *arguments)
        assert done.exit_code == 0, done.output
    assert make(aws, BUCKET, "cnn-tuning") is False
    assert make(aws, "b-bucket", "cnn-tuning") is True
    person = [
        statement
        for bucket in (BUCKET, "b-bucket")
        for statement in of_person("cnn-tuning", bucket, "cnn-tuning")["Statement"]
    ]
    rights = [(RIGHTS.get(call, call), params) for call, params in asked]
    assert len({right for right, _ in rights}) > 40
    refused = [(right, params) for right, params in rights if not any(allows(s, right, params) for s in person)]
    assert refused == []


def test_the_pages_line_makes_a_managed_policy_of_what_is_printed(folder, command):
    printed = command("remote", "policies", "b" * 63)  # as long as a bucket's name may be
    [line] = [text for text in (ROOT / "docs/hosts.md").read_text().splitlines() if "| python -c" in text]
    there, _, then = line.strip().partition(" | ")
    assert there == "cnn-tuning remote policies my-bucket"
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", then], input=printed.stdout, text=True, cwd=folder, env=path, check=True)
    policy = json.loads((folder / "person.json").read_text())
    assert policy == of_person("cnn-tuning", "b" * 63, "cnn-tuning")
    # IAM's quotas, whitespace not counted: an inline policy of a user has 2,048 characters, a managed one 6,144.
    # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html
    assert 2048 < len("".join(json.dumps(policy).split())) < 6144


def test_the_amis_that_are_shipped_are_of_those_that_may_be_asked_for():
    [images] = [s for s in of_person("x", "b", "p")["Statement"] if s["Sid"] == "Images"]
    for name in (host_config().gpu_ami, host_config().cpu_ami):
        assert fnmatchcase(f"arn:aws:ssm:{REGION}::parameter{name}", images["Resource"])


def test_the_matcher_tells_a_whole_bucket_from_a_prefix():
    [listing] = [s for s in of_person("x", "b", "p")["Statement"] if s["Sid"] == "Listing"]
    assert allows(listing, "s3:ListBucket", {"Bucket": "b", "Prefix": "p/runs/"})
    assert not allows(listing, "s3:ListBucket", {"Bucket": "b"})
