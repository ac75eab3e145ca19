"""What a type costs and whether it may be had: live from AWS; what cannot be asked is None, and a note says why.

On demand: the Price List API (it answers in us-east-1 for all regions). Spot: the newest price per zone.
Quotas: vCPUs of all running hosts of a family, of spot and on demand apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cnn_tuning.cloud.aws import Aws, telling
from cnn_tuning.errors import UserError

PRICING_REGION = "us-east-1"
HOURS_PER_MONTH = 730
# Every public IPv4 address in use: https://aws.amazon.com/vpc/pricing/
ADDRESS_PER_HOUR = 0.005

# https://docs.aws.amazon.com/general/latest/gr/ec2-service.html: family → quota codes on demand, spot.
_QUOTAS = {
    "g": ("L-DB2E81BA", "L-3819A6DF"),
    "vt": ("L-DB2E81BA", "L-3819A6DF"),
    "p": ("L-417A185B", "L-7212CCBC"),
    **dict.fromkeys("acdhimrtz", ("L-1216C47A", "L-34B43A08")),
}


@dataclass(frozen=True)
class Market:
    """Prices in US dollars per hour; quotas in vCPUs and what is in use of each; as far as they could be asked."""

    on_demand: Mapping[str, float] = field(default_factory=dict)
    spot: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quotas: Mapping[str, float] = field(default_factory=dict)
    used: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def quota_code(instance_type: str, market: str) -> str | None:
    """Return the code of the quota that a type counts against."""
    family = "".join(c for c in instance_type.split(".")[0] if not c.isdigit())
    if family.startswith(("inf", "trn", "dl")):  # quotas of their own
        return None
    known = _QUOTAS.get(family) or _QUOTAS.get(family[0])
    return known[market == "spot"] if known else None


def ask_market(aws: Aws, types: Sequence[str]) -> Market:
    """Ask for prices and quotas; without credentials, everything is unknown and one note says so."""
    try:
        aws.check()
    except UserError as error:
        return Market(notes=(f"prices and quotas unknown: {str(error).removeprefix('sts: ')}",))
    notes: list[str] = []
    on_demand = _ask(notes, "on-demand prices", lambda: on_demand_prices(aws, types))
    spot = _ask(notes, "spot prices", lambda: spot_prices(aws.client("ec2"), types))
    quotas = _ask(notes, "quotas", lambda: ask_quotas(aws.client("service-quotas"), types))
    used = _ask(notes, "vCPUs in use", lambda: vcpus_in_use(aws.client("ec2")))
    for about, known in (("on-demand", on_demand), ("spot", spot)):
        missing = [name for name in types if name not in known]
        if known and missing:
            notes.append(f"{about} price unknown in {aws.region}: {', '.join(missing)}")
    return Market(on_demand, spot, quotas, used, tuple(notes))


def _ask(notes: list[str], about: str, ask: Any) -> Any:
    try:
        return ask()
    except UserError as error:
        notes.append(f"{about} unknown: {error}")
        return {}


def on_demand_prices(aws: Aws, types: Iterable[str]) -> dict[str, float]:
    """Return US dollars per hour of those types that have a price in this region."""
    client = aws.client("pricing", PRICING_REGION)
    found = {}
    for name in types:
        price = on_demand_price(client, name, aws.region)
        if price is not None:
            found[name] = price
    return found


def on_demand_price(client: Any, instance_type: str, region: str) -> float | None:
    """Return US dollars per hour of a shared Linux host; None where there is no such offer."""
    wanted = {
        "instanceType": instance_type,
        "regionCode": region,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()]
    with telling("the Pricing API"):
        answer = client.get_products(ServiceCode="AmazonEC2", Filters=filters, MaxResults=100)
    prices = [price for text in answer["PriceList"] for price in hourly_prices(json.loads(text))]
    # More than one offer (it happens with new market options): the dearest, so that no budget is exceeded.
    return max(prices, default=None)


def hourly_prices(product: Mapping[str, Any]) -> list[float]:
    """Return the hourly on-demand prices in US dollars of one product of the price list, without free ones."""
    prices = []
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term.get("priceDimensions", {}).values():
            dollars = dimension.get("pricePerUnit", {}).get("USD")
            if dollars is not None and dimension.get("unit") == "Hrs" and float(dollars) > 0:
                prices.append(float(dollars))
    return prices


def spot_prices(client: Any, types: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for each type the newest price in each zone."""
    newest: dict[tuple[str, str], tuple[datetime, float]] = {}
    with telling("spot prices"):
        pages = client.get_paginator("describe_spot_price_history").paginate(
            InstanceTypes=list(types), ProductDescriptions=["Linux/UNIX"], StartTime=datetime.now(UTC)
        )
        for page in pages:
            for row in page["SpotPriceHistory"]:
                place, told = (
                    (row["InstanceType"], row["AvailabilityZone"]),
                    (row["Timestamp"], float(row["SpotPrice"])),
                )
                newest[place] = max(told, newest.get(place, told))
    found: dict[str, dict[str, float]] = {}
    for (name, zone), (_, price) in sorted(newest.items()):
        found.setdefault(name, {})[zone] = price
    return found


def ask_quotas(client: Any, types: Iterable[str]) -> dict[str, float]:
    """Return the vCPUs that each quota of these types allows, by quota code."""
    codes = {code for name in types for market in ("spot", "on-demand") if (code := quota_code(name, market))}
    found = {}
    for code in sorted(codes):
        with telling("Service Quotas"):
            answer = client.get_service_quota(ServiceCode="ec2", QuotaCode=code)
        found[code] = float(answer["Quota"]["Value"])
    return found


def vcpus_in_use(client: Any) -> dict[str, float]:
    """Return the vCPUs of all instances of the region that run or are about to, by quota code."""
    alive = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    found: dict[str, float] = {}
    with telling("vCPUs in use"):
        for page in client.get_paginator("describe_instances").paginate(Filters=alive):
            for item in (item for group in page["Reservations"] for item in group["Instances"]):
                code = quota_code(item["InstanceType"], item.get("InstanceLifecycle", "on-demand"))
                shape = item.get("CpuOptions", {})
                if code:
                    vcpus = shape.get("CoreCount", 0) * shape.get("ThreadsPerCore", 1)
                    found[code] = found.get(code, 0.0) + vcpus
    return found


def disk_per_hour(disk_gb: int, per_gb_month: float) -> float:
    """Return US dollars per hour of a disk."""
    return disk_gb * per_gb_month / HOURS_PER_MONTH
