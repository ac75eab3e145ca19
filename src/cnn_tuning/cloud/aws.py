"""The edge to AWS: clients in, one-line errors out. No account number or secret leaves through a message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cnn_tuning.errors import HIDDEN, UserError, redact

LOGIN = "run `aws configure` or `aws sso login`, or set AWS_PROFILE"
_ACCOUNT = re.compile(r"(?<![0-9A-Za-z])(?<!-[0-9a-f]{4}-)[0-9]{12}(?![0-9A-Za-z])")  # no end of a UUID
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_WRONG = {"AuthFailure", "InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch",
          "InvalidAccessKeyId", "IncompleteSignature", "MissingAuthenticationToken"}  # fmt: skip
_DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "NotAuthorized", "403"}
_QUOTAS = "ask for more vCPUs in Service Quotas (EC2), or take a smaller type"

# What EC2 says when a host cannot be had, and what to do about it.
REMEDIES = {
    "InsufficientInstanceCapacity": "no capacity now: name more types or zones, host.on_demand_fallback=true, "
    "another region, or try later",
    "UnfulfillableCapacity": "no capacity now: name more types or zones, host.on_demand_fallback=true, "
    "another region, or try later",
    "MaxSpotInstanceCountExceeded": f"the spot quota is reached: {_QUOTAS}",
    "VcpuLimitExceeded": f"the vCPU quota is reached: {_QUOTAS}",
    "InstanceLimitExceeded": f"the instance quota is reached: {_QUOTAS}",
    "ServiceQuotaExceededException": "a quota of EventBridge Scheduler is reached: delete schedules that are not "
    "needed, or ask for more in Service Quotas",
    "NoSuchBucket": "there is no such bucket: check host.bucket, or make it with `cnn-tuning remote init BUCKET`",
    "SpotMaxPriceTooLow": "the spot price is above host.max_price_per_hour: raise it, or name other types",
    "InvalidAMIID.NotFound": "the AMI is not in this region: check host.gpu_ami, host.cpu_ami and host.region",
    "InvalidAMIID.Malformed": "the AMI's SSM parameter holds no AMI: check host.gpu_ami and host.cpu_ami",
    "InvalidAMIID.Unavailable": "the AMI has been withdrawn: check host.gpu_ami and host.cpu_ami",
    "ParameterNotFound": "no such SSM parameter here: check host.gpu_ami, host.cpu_ami and host.region",
    "Unsupported": "a zone lacks this type: name other types or subnets",
    "InsufficientFreeAddressesInSubnet": "the subnet is full: name another one in host.subnets",
    "InvalidSubnetID.NotFound": "check host.subnets and host.region",
    "RequestLimitExceeded": "too many requests: try again in a minute",
    "OptInRequired": "the account is not signed up for this, or the region is not enabled",
    "PendingVerification": "AWS is still verifying the account for this region: try again later",
}


_NO_CAPACITY = {"InsufficientInstanceCapacity", "UnfulfillableCapacity"}


class NoCapacity(UserError):
    """There is no host to be had now; there may be one in a minute."""


@dataclass(frozen=True)
class Aws:
    """One region of one account, with the credentials that were there when it was made."""

    region: str
    _clients: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False, compare=False)

    def client(self, service: str, region: str | None = None) -> Any:
        """Return a client that gives up within about two minutes, of S3 within 15 s."""
        key = (service, region or self.region)
        if key not in self._clients:
            with telling(service):
                self._clients[key] = self._session().client(*key, config=_settings(service))
        return self._clients[key]

    def _session(self) -> Any:
        import boto3

        # Of its own: boto3's default session would keep credentials that have changed since.
        if ("", "") not in self._clients:
            self._clients["", ""] = boto3.Session()
        return self._clients["", ""]

    def check(self) -> None:
        """Ask AWS whether there are valid credentials; it costs nothing."""
        self.account()

    def account(self) -> str:
        """Return the account's number, for conditions in policies only: it is never printed."""
        with telling("sts"):
            return str(self.client("sts").get_caller_identity()["Account"])


def _settings(service: str) -> Any:
    from botocore.config import Config

    if service == "s3":  # it answers at once or not at all: told within 15 s
        return Config(connect_timeout=3, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 2})
    return Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 3})


def hide_account(text: str) -> str:
    """Return `text` with secrets and account numbers hidden."""
    return _ACCOUNT.sub(HIDDEN, redact(text))


def code_of(error: Exception) -> str:
    """Return AWS's code of an error, or the name of its kind."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code") or type(error).__name__)


def explain(code: str, message: str, doing: str) -> UserError:
    """Return one line: what failed, and what to do about it."""
    said = hide_account(" ".join(message.split()))
    if code in _EXPIRED:
        return UserError(f"{doing}: the AWS credentials have expired: {LOGIN}")
    if code in _WRONG:
        return UserError(f"{doing}: AWS does not accept the credentials given: {LOGIN}")
    if code in _DENIED:
        # What follows is an encoded message that can be decoded by the account's owner only.
        said = said.split("Encoded authorization")[0].strip()
        return UserError(f"{doing}: not allowed ({said}); `cnn-tuning remote policies` prints what is needed")
    remedy = REMEDIES.get(code)
    kind = NoCapacity if code in _NO_CAPACITY else UserError
    return kind(f"{doing}: {code}: {remedy}" if remedy else f"{doing}: {code}: {said}")


@contextmanager
def telling(doing: str) -> Iterator[None]:
    """Turn what boto3 raises inside into a `UserError` of one line."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as e
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except (e.NoCredentialsError, e.PartialCredentialsError, e.CredentialRetrievalError):
        raise UserError(f"{doing}: no AWS credentials were found: {LOGIN}") from None
    except e.ProfileNotFound as error:
        raise UserError(f"{doing}: {error}: `aws configure list-profiles` names those there are") from None
    except (e.SSOTokenLoadError, e.UnauthorizedSSOTokenError, e.TokenRetrievalError):
        raise UserError(f"{doing}: the AWS credentials have expired: {LOGIN}") from None
    except e.NoRegionError:
        raise UserError(f"{doing}: no AWS region: set host.region") from None
    except (e.HTTPClientError, e.ConnectionError, e.InvalidRegionError) as error:  # also: no connection, timeouts
        reason = " ".join(str(error).split())
        raise UserError(
            f"{doing}: AWS cannot be reached ({hide_account(reason)}); check network and host.region"
        ) from None
    except e.ClientError as error:
        raise explain(code_of(error), str(error.response.get("Error", {}).get("Message", "")), doing) from None
    except e.WaiterError as error:
        raise UserError(f"{doing}: took too long ({hide_account(str(error))}); try again") from None
    except (e.IncompleteReadError, RetriesExceededError) as error:
        raise UserError(f"{doing}: the transfer broke off ({hide_account(str(error))}); try again") from None
    except (e.BotoCoreError, Boto3Error) as error:
        raise UserError(f"{doing}: {hide_account(' '.join(str(error).split()))}") from None
