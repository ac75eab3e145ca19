"""The section `host`: which machines may be rented, where, and what may be spent. It changes no result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,23}$")]

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class GpuConfig:
    """One GPU of a type: its name, CUDA compute capability (its generation) and memory."""

    __pydantic_config__ = _STRICT
    name: str
    compute_capability: _Positive
    memory_gib: _Positive
    count: _Count = 1


@dataclass(frozen=True)
class InstanceConfig:
    """An instance type. `speed`: of training, in reference cores (`calibration.reference`); an estimate.

    `network_gbit`: per second, sustained. `retired`: why it cannot be had any more. `instead`: the type to take
    where this one is refused.
    """

    __pydantic_config__ = _STRICT
    vcpus: _Count
    memory_gib: _Positive
    speed: _Positive
    gpu: GpuConfig | None = None
    network_gbit: _Positive | None = None
    retired: str | None = None
    instead: str | None = None


@dataclass(frozen=True)
class CalibrationConfig:
    """Where no run was measured: samples/s of a network (`model.name`) on one `reference` core; from where."""

    __pydantic_config__ = _STRICT
    reference: str
    samples_per_second: dict[str, _Positive] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class HostConfig:
    """Hosts on EC2. `candidates`: names of `types`; a launch may take any of them that is not refused.

    `project` is the tag by which everything is found again. `budget` in US dollars and `max_hours` end a host,
    whichever comes first, as do `idle_minutes` without work. One that is taken away is replaced up to
    `max_replacements` times within the same budget and hours. `max_price_per_hour` (null: the on-demand price).
    `bucket` null: given by `remote init`. `gpu_ami`, `cpu_ami`: SSM parameters that hold an AMI's id.
    `oldest_compute_capability`: of the GPUs that the installed CUDA build of torch still serves.
    `setup_minutes`: boot, installation and data, paid for each host. `subnets` empty: all of the default VPC.
    """

    __pydantic_config__ = _STRICT
    name: str
    region: Annotated[str, Field(pattern=r"^[a-z]{2,}(-[a-z]+)+-[0-9]+$")]
    gpu_ami: str
    cpu_ami: str
    candidates: Annotated[tuple[str, ...], Field(min_length=1)]
    types: dict[str, InstanceConfig]
    calibration: CalibrationConfig
    project: _Name = "cnn-tuning"
    market: Literal["spot", "on-demand"] = "spot"
    on_demand_fallback: bool = False
    bucket: str | None = None
    prefix: str = "cnn-tuning"
    budget: _Positive = 2.0
    max_hours: _Positive = 3.0
    max_price_per_hour: _Positive | None = None
    idle_minutes: _Count = 15
    max_replacements: Annotated[int, Field(ge=0)] = 3
    disk_gb: _Count = 75
    disk_per_gb_month: _Positive = 0.08
    setup_minutes: _Positive = 8.0
    oldest_compute_capability: _Positive = 7.5
    subnets: tuple[str, ...] = ()
