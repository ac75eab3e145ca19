"""`remote init`: a hardened bucket, a DVC remote that verifies, and policies that name no account."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys

import pytest
from renting import ACCOUNT, ROOT, intercept

from cnn_tuning.cloud.bucket import make
from cnn_tuning.config import compose
from cnn_tuning.errors import UserError


@pytest.fixture
def repository(folder):
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    return folder


def test_the_bucket_is_private_versioned_encrypted_and_for_tls_only(aws):
    s3 = aws.client("s3")
    assert make(aws, "a-bucket", "ours") is True
    assert s3.get_bucket_versioning(Bucket="a-bucket")["Status"] == "Enabled"
    rules = s3.get_bucket_encryption(Bucket="a-bucket")["ServerSideEncryptionConfiguration"]["Rules"]
    assert rules[0]["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    assert all(s3.get_public_access_block(Bucket="a-bucket")["PublicAccessBlockConfiguration"].values())
    [statement] = json.loads(s3.get_bucket_policy(Bucket="a-bucket")["Policy"])["Statement"]
    assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_a_bucket_that_is_there_keeps_its_contents_and_other_statements(aws):
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="a-bucket")
    s3.put_object(Bucket="a-bucket", Key="kept", Body=b"1")
    theirs = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 30}}
    s3.put_bucket_lifecycle_configuration(Bucket="a-bucket", LifecycleConfiguration={"Rules": [theirs]})
    own = {"Sid": "Mine", "Effect": "Deny", "Principal": "*", "Action": "s3:DeleteBucket",
           "Resource": "arn:aws:s3:::a-bucket"}  # fmt: skip
    s3.put_bucket_policy(Bucket="a-bucket", Policy=json.dumps({"Version": "2012-10-17", "Statement": [own]}))
    assert make(aws, "a-bucket", "ours") is False
    assert make(aws, "a-bucket", "ours") is False
    statements = json.loads(s3.get_bucket_policy(Bucket="a-bucket")["Policy"])["Statement"]
    assert [statement["Sid"] for statement in statements] == ["Mine", "TlsOnly"]
    rules = s3.get_bucket_lifecycle_configuration(Bucket="a-bucket")["Rules"]
    assert [(rule["ID"], rule["Filter"]["Prefix"]) for rule in rules] == [
        ("theirs", "logs/"),
        ("ours runs", "ours/runs/"),
    ]
    assert rules[1]["NoncurrentVersionExpiration"]["NoncurrentDays"] == 7
    # Moto would refuse to read it: it knows no TLS.
    assert [item["Key"] for item in s3.list_objects_v2(Bucket="a-bucket")["Contents"]] == ["kept"]


def test_a_bucket_in_another_region_is_told(aws):
    aws.client("s3").create_bucket(
        Bucket="a-bucket", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    with pytest.raises(UserError, match=r"a-bucket is in eu-west-1: .*host\.region=eu-west-1"):
        make(aws, "a-bucket", "ours")


def test_a_bucket_of_someone_else_is_told(aws):
    denied = {"Error": {"Code": "AccessDenied", "Message": "no"}}
    stop = intercept(aws.client("s3"), "GetBucketLocation", lambda _: denied)
    try:
        with pytest.raises(UserError, match="someone else"):
            make(aws, "a-bucket", "ours")
    finally:
        stop()


def test_a_bad_name_is_told_before_anything_is_asked(aws):
    with pytest.raises(UserError, match="3 to 63"):
        make(aws, "Not_A_Bucket", "ours")


def test_init_makes_a_remote_that_verifies(aws, repository, command):
    done = command("remote", "init", "a-bucket")
    assert done.exit_code == 0, done.output
    read = configparser.ConfigParser()
    read.read(repository / ".dvc/config")
    assert read["core"]["remote"] == "storage"
    remote = dict(read["'remote \"storage\"'"])
    assert remote == {"url": "s3://a-bucket/cnn-tuning/dvc", "region": "us-east-1", "verify": "true"}
    policies = json.loads(done.stdout)
    assert set(policies) == {"person", "person, for Ray clusters", "host", "guard", "bucket"}
    assert ACCOUNT not in done.output
    (repository / "params.yaml").write_text("experiment: mnist\n")
    elsewhere = command("remote", "init", "b-bucket")
    assert elsewhere.exit_code == 1 and "--force" in elsewhere.output
    assert "b-bucket" not in {bucket["Name"] for bucket in aws.client("s3").list_buckets()["Buckets"]}


def test_policies_need_no_aws_and_are_of_least_privilege(no_aws, folder, command):
    told = json.loads(command("remote", "policies", "a-bucket").output)
    for statement in told["person"]["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert "*" not in actions
        writes = [a for a in actions if not a.split(":")[1].startswith(("Describe", "Get", "List"))]
        narrowed = statement["Resource"] != "*" or "Condition" in statement
        assert narrowed or not writes or statement["Sid"] == "Launch", statement
    assert ACCOUNT not in json.dumps(told)


def test_without_a_bucket_the_command_says_which_is_meant(no_aws, folder, command):
    (folder / "params.yaml").write_text("experiment: mnist\n")
    assert "name a bucket" in command("remote", "policies").output


def test_the_pages_way_to_zero_empties_a_versioned_bucket(aws, monkeypatch):
    page = (ROOT / "docs/hosts.md").read_text()
    code = page.split("python - my-bucket <<'END'\n")[1].split("END\n")[0]
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="my-bucket")
    s3.put_bucket_versioning(Bucket="my-bucket", VersioningConfiguration={"Status": "Enabled"})
    for body in (b"1", b"2"):
        s3.put_object(Bucket="my-bucket", Key="kept", Body=body)
    s3.delete_object(Bucket="my-bucket", Key="kept")
    monkeypatch.setattr(sys, "argv", ["-", "my-bucket"])
    exec(code, {})
    s3.delete_bucket(Bucket="my-bucket")
    assert s3.list_buckets()["Buckets"] == []


def test_the_pages_own_host_type_is_valid(no_aws, tmp_path):
    page = (ROOT / "docs/hosts.md").read_text()
    block = page.split("conf/host/mine.yaml`:\n\n```yaml\n")[1].split("```")[0]
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf/host/mine.yaml").write_text(block)
    host = compose(["host=mine"], params=None, conf=tmp_path / "conf").host
    assert host.candidates == ("g6.4xlarge",)
    assert host.types["g6.4xlarge"].gpu.name == "L4"
