"""The section `serving`: which model answers, where, with how much of it, within which limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class EndpointConfig:
    """A SageMaker endpoint, in the region of `host`. Null: `name` is the model's, `bucket` that of `host`.

    `name`: at most 35 characters, so that what MLflow makes of it fits SageMaker's 63. `image`: in ECR, as
    `repository:tag` of the own account or as a whole URI. `role`: that SageMaker takes, by its name or ARN.
    """

    __pydantic_config__ = _STRICT
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9](-?[a-zA-Z0-9]){0,34}$", max_length=35)] | None = None
    instance_type: Annotated[str, Field(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9-]+$")] = "ml.c5.large"
    instances: _Count = 1
    image: str | None = None
    role: str | None = None
    bucket: str | None = None
    timeout_s: _Count = 1200


@dataclass(frozen=True)
class ContainerConfig:
    """An image that answers by itself. `extra_index`: a package index that the build asks, too."""

    __pydantic_config__ = _STRICT
    image: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._/-]*(:[A-Za-z0-9_.-]+)?$")] = "cnn-tuning"
    extra_index: Annotated[str, Field(pattern=r"^https://[^@\s\"'\\]+$")] | None = None


@dataclass(frozen=True)
class ServingConfig:
    """What answers, and its limits (bytes, pixels, seconds). `model`, `alias` null: those of `registry`.

    `target`: what the option is made for. `host`, `port`, the time limits and `allowed_hosts` are of the front
    only; `workers` and the limits on images hold wherever the model is deployed.
    """

    __pydantic_config__ = _STRICT
    name: str
    target: Literal["local", "container", "sagemaker"] = "local"
    model: str | None = None
    alias: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    workers: _Count = 1
    max_body_bytes: _Count = 10_000_000
    max_pixels: _Count = 50_000_000
    max_images: _Count = 256
    header_timeout_s: _Positive = 10.0
    body_timeout_s: _Positive = 15.0
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    container: ContainerConfig = field(default_factory=ContainerConfig)
