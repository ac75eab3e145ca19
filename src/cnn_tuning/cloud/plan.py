"""Which host for this experiment: the work, a speed and the market in, ranked options with reasons out. Pure.

Time is images × epochs over the images per second of a type. A run measured on the very type gives them; else
a measured run, or the calibration table, is scaled by the types' estimated relative speeds, and each option
says which (`basis`). Every option pays for `setup_minutes`, its disk and its address, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cnn_tuning.cloud.prices import ADDRESS_PER_HOUR, Market, disk_per_hour, quota_code
from cnn_tuning.config import HostConfig, InstanceConfig
from cnn_tuning.errors import UserError

Basis = Literal["measured", "scaled from a measured run", "calibration table", "unknown"]


@dataclass(frozen=True)
class Work:
    """How much is trained: images seen in all epochs of all trainings (None: not known), by network `model`."""

    images: int | None
    model: str


@dataclass(frozen=True)
class Measured:
    """A run that was measured: images per second on `cores` reference cores, or on an instance type."""

    samples_per_second: float
    cores: float | None = None
    instance_type: str | None = None


@dataclass(frozen=True)
class Option:
    """One type: what it is, what it would take and cost, and why it cannot be taken (`refused`)."""

    type: str
    gpu: str | None
    vcpus: int
    memory_gib: float
    basis: Basis
    samples_per_second: float | None
    hours: float | None
    on_demand_per_hour: float | None
    spot_per_hour: Mapping[str, float] = field(default_factory=dict)
    usd_on_demand: float | None = None
    usd_spot: Mapping[str, float] = field(default_factory=dict)
    quota_ok: bool | None = None
    refused: str | None = None

    def per_hour(self, market: str) -> float | None:
        """Return the lowest price per hour in a market, if known."""
        return min(self.spot_per_hour.values(), default=None) if market == "spot" else self.on_demand_per_hour

    def usd(self, market: str) -> float | None:
        """Return what the experiment would cost at that price, if known."""
        return min(self.usd_spot.values(), default=None) if market == "spot" else self.usd_on_demand


def rank(host: HostConfig, work: Work, measured: Sequence[Measured], market: Market) -> list[Option]:
    """Return an option for each candidate: those that can be taken first, then by dollars, then by hours.

    Where nobody knows the hours, by dollars per hour.
    """
    options = [_option(host, name, work, measured, market) for name in host.candidates]

    def key(option: Option) -> tuple[bool, float, float, float]:
        figures = option.usd(host.market), option.hours, option.per_hour(host.market)
        usd, hours, per_hour = (float("inf") if value is None else value for value in figures)
        return option.refused is not None, usd, hours, per_hour

    return sorted(options, key=key)


def _option(host: HostConfig, name: str, work: Work, measured: Sequence[Measured], market: Market) -> Option:
    kind = host.types.get(name)
    if kind is None:
        reason = "not in host.types: add its vCPUs, memory and GPU in conf/host"
        return Option(name, None, 0, 0.0, "unknown", None, None, None, refused=reason)
    basis, speed = predicted_speed(host, name, kind, work, measured)
    hours = None
    if speed is not None and work.images is not None:
        hours = work.images / speed / 3600 + host.setup_minutes / 60
    extras = extras_per_hour(host)
    on_demand, spot = market.on_demand.get(name), dict(market.spot.get(name, {}))
    code = quota_code(name, host.market) or ""
    quota, used = market.quotas.get(code), market.used.get(code, 0.0)
    option = Option(
        type=name,
        gpu=f"{kind.gpu.name} {kind.gpu.memory_gib:g} GB" if kind.gpu else None,
        vcpus=kind.vcpus,
        memory_gib=kind.memory_gib,
        basis=basis,
        samples_per_second=speed,
        hours=hours,
        on_demand_per_hour=on_demand,
        spot_per_hour=spot,
        usd_on_demand=None if None in (hours, on_demand) else hours * (on_demand + extras),  # type: ignore[operator]
        usd_spot={} if hours is None else {zone: hours * (price + extras) for zone, price in spot.items()},
        quota_ok=None if quota is None else quota - used >= kind.vcpus,
    )
    taken = f", {used:g} in use" if used else ""
    full = f"the {host.market} quota is {quota or 0:g} vCPUs of {kind.vcpus}{taken}"
    return _with_refusal(host, kind, option, full, known=bool(market.on_demand or market.spot))


def predicted_speed(
    host: HostConfig, name: str, kind: InstanceConfig, work: Work, measured: Sequence[Measured]
) -> tuple[Basis, float | None]:
    """Return the expected images per second of a type, and what they rest on."""
    own = [run.samples_per_second for run in measured if run.instance_type == name]
    if own:
        return "measured", own[-1]
    for run in reversed(measured):
        known = host.types.get(run.instance_type or "")
        cores = known.speed if known else run.cores
        if cores:
            return "scaled from a measured run", run.samples_per_second / cores * kind.speed
    of_one_core = host.calibration.samples_per_second.get(work.model)
    return ("calibration table", of_one_core * kind.speed) if of_one_core else ("unknown", None)


def _with_refusal(host: HostConfig, kind: InstanceConfig, option: Option, full: str, *, known: bool) -> Option:
    reason = unsuited(host, kind)
    price, usd = option.per_hour(host.market), option.usd(host.market)
    if reason is None and option.quota_ok is False:
        reason = f"{full}: ask for more in Service Quotas"
    if reason is None and known and price is None:
        reason = f"no {host.market} price: not offered in {host.region}, or the price is unknown"
    cap = host.max_price_per_hour
    if reason is None and price is not None and cap is not None and price > cap:
        reason = f"${price:.3f} per hour is above host.max_price_per_hour ${cap:.3f}"
    if reason is None and option.hours is not None and option.hours > host.max_hours:
        reason = f"takes {option.hours:.1f} h of {host.max_hours:g} h allowed (host.max_hours)"
    if reason is None and usd is not None and usd > host.budget:
        reason = f"costs ${usd:.2f} of ${host.budget:.2f} allowed (host.budget)"
    return replace(option, refused=reason) if reason else option


def unsuited(host: HostConfig, kind: InstanceConfig) -> str | None:
    """Return why a type cannot serve at any price: retired, or a GPU too old for the CUDA build of torch."""
    reasons = []
    if kind.gpu and kind.gpu.compute_capability < host.oldest_compute_capability:
        reasons.append(
            f"{kind.gpu.name} (compute capability {kind.gpu.compute_capability}) is older than the CUDA build of "
            f"torch serves ({host.oldest_compute_capability})"
        )
    if kind.retired:
        reasons.append(kind.retired)
    if not reasons:
        return None
    return "; ".join(reasons) + (f": take {kind.instead} instead" if kind.instead else "")


def extras_per_hour(host: HostConfig) -> float:
    """Return what a host costs per hour besides its type: disk and public address."""
    return disk_per_hour(host.disk_gb, host.disk_per_gb_month) + ADDRESS_PER_HOUR


def dearest_per_hour(host: HostConfig, options: Sequence[Option]) -> float:
    """Return the most that any of these types may cost per hour, spot prices risen to their cap included.

    Raises:
        UserError: an on-demand price is not known, and no cap stands in for it.
    """
    cap = host.max_price_per_hour if host.market == "spot" and not host.on_demand_fallback else None
    unknown = [option.type for option in options if option.on_demand_per_hour is None and cap is None]
    if unknown:
        raise UserError(f"price unknown: {', '.join(unknown)}: set host.max_price_per_hour, or name other types")
    prices = [min(price for price in (option.on_demand_per_hour, cap) if price is not None) for option in options]
    return max(prices) + extras_per_hour(host)
