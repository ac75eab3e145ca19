"""Least-privilege policies as plain mappings: of a host, its guard, the person, the bucket. Pure."""

from __future__ import annotations

from typing import Any

from cnn_tuning.cloud.names import PATH

Policy = dict[str, Any]


def _policy(*statements: dict[str, Any]) -> Policy:
    return {"Version": "2012-10-17", "Statement": list(statements)}


def trust(service: str, account: str | None = None) -> Policy:
    """Return who may take a role: a service, on behalf of this account only where the service says on whose."""
    statement: dict[str, Any] = {
        "Effect": "Allow",
        "Principal": {"Service": service},
        "Action": "sts:AssumeRole",
    }
    if account:
        statement["Condition"] = {"StringEquals": {"aws:SourceAccount": account}}
    return _policy(statement)


def of_storage(bucket: str, prefix: str) -> list[dict[str, Any]]:
    """Return the statements that allow to read and write below a prefix, and nothing else of the bucket."""
    return [
        {
            "Sid": "Objects",
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
            "Resource": f"arn:aws:s3:::{bucket}/{prefix}/*",
        },
        {
            "Sid": "Listing",
            "Effect": "Allow",
            "Action": "s3:ListBucket",
            "Resource": f"arn:aws:s3:::{bucket}",
            "Condition": {"StringLike": {"s3:prefix": [prefix, f"{prefix}/*"]}},
        },
    ]


def terminate(project: str, run: str) -> dict[str, Any]:
    """Return the statement that allows to end the hosts of one run, by their tags."""
    return {
        "Sid": "EndThisRun",
        "Effect": "Allow",
        "Action": "ec2:TerminateInstances",
        "Resource": "arn:aws:ec2:*:*:instance/*",
        "Condition": {"StringEquals": {"aws:ResourceTag/project": project, "aws:ResourceTag/run": run}},
    }


def of_host(project: str, run: str, bucket: str, prefix: str) -> Policy:
    """Return what a host may do: its prefix, ending itself, and answering Session Manager (logs, tunnel)."""
    session = {
        "Sid": "SessionManager",
        "Effect": "Allow",
        "Action": [
            "ssm:UpdateInstanceInformation",
            "ssmmessages:CreateControlChannel",
            "ssmmessages:CreateDataChannel",
            "ssmmessages:OpenControlChannel",
            "ssmmessages:OpenDataChannel",
        ],
        "Resource": "*",
    }
    return _policy(*of_storage(bucket, prefix), terminate(project, run), session)


def of_guard(project: str, run: str) -> Policy:
    """Return what the schedule may do that ends a host: end it."""
    return _policy(terminate(project, run))


def of_person(project: str, bucket: str, prefix: str) -> Policy:
    """Return what the person needs who runs `cnn-tuning host` and `remote`."""
    roles, profiles = (f"arn:aws:iam::*:{kind}{PATH}{project}_*" for kind in ("role", "instance-profile"))
    made = ["CreateFleet", "RunInstances", "CreateLaunchTemplate", "CreateSecurityGroup"]
    services = ["ec2fleet.amazonaws.com", "spot.amazonaws.com"]
    return _policy(
        *of_storage(bucket, prefix),
        _allow("Bucket", f"arn:aws:s3:::{bucket}", *_BUCKET),
        _allow("Look", "*", *_LOOK),
        _allow("Images", "arn:aws:ssm:*:*:parameter/aws/service/*", "ssm:GetParameter"),
        _allow("Launch", "*", "ec2:CreateFleet", "ec2:CreateLaunchTemplate", "ec2:CreateSecurityGroup"),
        _allow("RunFrom", _PARTS, "ec2:RunInstances"),
        _when("RunTagged", "arn:aws:ec2:*:*:instance/*", {"aws:RequestTag/project": project}, "ec2:RunInstances"),
        _when("Tag", "*", {"ec2:CreateAction": made}, "ec2:CreateTags"),
        _when("Remove", "*", {"aws:ResourceTag/project": project}, *_REMOVE),
        _allow("Roles", [roles, profiles], *_ROLES),
        _when("Pass", roles, {"iam:PassedToService": ["ec2.amazonaws.com", "scheduler.amazonaws.com"]},
              "iam:PassRole"),
        _when("FirstUse", "arn:aws:iam::*:role/aws-service-role/*", {"iam:AWSServiceName": services},
              "iam:CreateServiceLinkedRole"),
        _allow("Guard", f"arn:aws:scheduler:*:*:schedule/default/{project}_*", "scheduler:CreateSchedule",
               "scheduler:DeleteSchedule", "scheduler:GetSchedule"),
        _when("Tunnel", "arn:aws:ec2:*:*:instance/*", {"ssm:resourceTag/project": project}, "ssm:StartSession"),
        _allow("TunnelHow", "arn:aws:ssm:*:*:document/AWS-StartPortForwardingSession", "ssm:StartSession"),
        _allow("OwnTunnel", [f"arn:aws:ssm:*:*:session/${{aws:{who}}}-*" for who in ("userid", "username")],
               "ssm:TerminateSession", "ssm:ResumeSession", "ssmmessages:OpenDataChannel"),
    )  # fmt: skip


_BUCKET = ("s3:CreateBucket", "s3:GetBucket*", "s3:PutBucketVersioning", "s3:GetEncryptionConfiguration",
           "s3:PutEncryptionConfiguration", "s3:PutBucketPublicAccessBlock", "s3:PutBucketPolicy",
           "s3:PutBucketOwnershipControls", "s3:GetLifecycleConfiguration",
           "s3:PutLifecycleConfiguration")  # fmt: skip
_LOOK = ("ec2:Describe*", "pricing:GetProducts", "servicequotas:GetServiceQuota", "scheduler:ListSchedules",
         "iam:ListRoles", "iam:ListInstanceProfiles", "sts:GetCallerIdentity", "sagemaker:ListEndpoints",
         "sagemaker:ListTags", "sagemaker:DescribeEndpoint", "sagemaker:DescribeEndpointConfig")  # fmt: skip
_PARTS = [
    f"arn:aws:ec2:*:*:{kind}/*"
    for kind in ("image", "subnet", "security-group", "network-interface", "volume", "launch-template", "snapshot")
]
_REMOVE = ("ec2:TerminateInstances", "ec2:DeleteLaunchTemplate", "ec2:DeleteSecurityGroup", "ec2:DeleteVolume",
           "ec2:ReleaseAddress")  # fmt: skip
_ROLES = tuple(
    f"iam:{verb}"
    for verb in ("CreateRole", "DeleteRole", "GetRole", "PutRolePolicy", "DeleteRolePolicy", "ListRolePolicies",
                 "TagRole", "CreateInstanceProfile", "DeleteInstanceProfile", "GetInstanceProfile",
                 "AddRoleToInstanceProfile", "RemoveRoleFromInstanceProfile", "TagInstanceProfile")
)  # fmt: skip


def _allow(sid: str, resource: str | list[str], *actions: str) -> dict[str, Any]:
    return {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": resource}


def _when(sid: str, resource: str, equal: dict[str, Any], *actions: str) -> dict[str, Any]:
    return {**_allow(sid, resource, *actions), "Condition": {"StringEquals": equal}}


def of_bucket(bucket: str) -> dict[str, Any]:
    """Return the statement that refuses every request without TLS."""
    return {
        "Sid": "TlsOnly",
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }
