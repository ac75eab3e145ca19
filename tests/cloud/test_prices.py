"""Prices and quotas: the shapes that AWS sends, and what is said where it sends none."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import boto3
import pytest
from botocore.stub import ANY, Stubber
from renting import REGION, ROOT, answering, product

from cnn_tuning.cloud.aws import Aws
from cnn_tuning.cloud.prices import (
    ask_market,
    ask_quotas,
    hourly_prices,
    on_demand_prices,
    quota_code,
    spot_prices,
)
from cnn_tuning.config import compose
from cnn_tuning.errors import UserError


def stubbed(service, region=REGION):
    client = boto3.Session("a", "b").client(service, region)
    return client, Stubber(client)


def row(zone, price, hour, kind="g5.xlarge"):
    at = datetime(2026, 11, 21, hour, tzinfo=UTC)
    return {"AvailabilityZone": zone, "InstanceType": kind, "SpotPrice": price, "Timestamp": at,
            "ProductDescription": "Linux/UNIX"}  # fmt: skip


def test_the_on_demand_price_is_read_from_the_price_list():
    client, stub = stubbed("pricing", "us-east-1")
    stub.add_response("get_products", {"PriceList": [product("1.0060000000")]},
                      {"ServiceCode": "AmazonEC2", "MaxResults": 100, "Filters": ANY})  # fmt: skip
    stub.add_response("get_products", {"PriceList": []})
    with stub:
        found = on_demand_prices(answering(pricing=client), ["g5.xlarge", "g9.xlarge"])
    assert found == {"g5.xlarge": 1.006}


def test_only_what_is_paid_by_the_hour_is_a_price():
    assert hourly_prices(json.loads(product("0.0000000000"))) == []
    assert hourly_prices(json.loads(product("3.0", unit="Quantity"))) == []
    assert hourly_prices({"terms": {}}) == []


def test_the_newest_spot_price_of_each_zone_counts():
    client, stub = stubbed("ec2")
    rows = [row("us-east-1a", "0.40", 9), row("us-east-1a", "0.35", 12), row("us-east-1b", "0.50", 10)]
    stub.add_response("describe_spot_price_history", {"SpotPriceHistory": rows})
    with stub:
        assert spot_prices(client, ["g5.xlarge"]) == {"g5.xlarge": {"us-east-1a": 0.35, "us-east-1b": 0.5}}


@pytest.mark.parametrize(
    ("kind", "market", "code"),
    [
        ("g5.xlarge", "spot", "L-3819A6DF"),
        ("g4dn.xlarge", "on-demand", "L-DB2E81BA"),
        ("c7i.xlarge", "spot", "L-34B43A08"),
        ("p3.2xlarge", "on-demand", "L-417A185B"),
        ("trn1.2xlarge", "spot", None),
    ],
)
def test_each_family_has_its_quota(kind, market, code):
    assert quota_code(kind, market) == code


def test_quotas_are_asked_once_for_each_family_and_market():
    client, stub = stubbed("service-quotas")
    for code in ("L-3819A6DF", "L-DB2E81BA"):
        stub.add_response(
            "get_service_quota",
            {"Quota": {"QuotaCode": code, "Value": 8.0}},
            {"ServiceCode": "ec2", "QuotaCode": code},
        )
    with stub:
        assert ask_quotas(client, ["g5.xlarge", "g6.xlarge"]) == {"L-3819A6DF": 8.0, "L-DB2E81BA": 8.0}


def test_what_fails_is_noted_and_the_rest_is_known(aws):
    pricing, no_prices = stubbed("pricing", "us-east-1")
    quotas, no_quotas = stubbed("service-quotas")
    no_prices.add_client_error("get_products", "AccessDeniedException", "User: arn:aws:iam::123456789012:user/ann "
                               "is not authorized to perform: pricing:GetProducts")  # fmt: skip
    no_quotas.add_client_error("get_service_quota", "TooManyRequestsException", "slow down")
    ec2, spot = stubbed("ec2")
    spot.add_response("describe_spot_price_history", {"SpotPriceHistory": [row("us-east-1a", "0.4", 9)]})
    one = {"InstanceType": "g5.xlarge", "CpuOptions": {"CoreCount": 2, "ThreadsPerCore": 2}}
    others = [{**one, "InstanceLifecycle": "spot"}] * 2
    spot.add_response("describe_instances", {"Reservations": [{"Instances": [one, *others]}]})
    with no_prices, no_quotas, spot:
        market = ask_market(answering(pricing=pricing, service_quotas=quotas, ec2=ec2), ["g5.xlarge", "g6.xlarge"])
    assert market.spot == {"g5.xlarge": {"us-east-1a": 0.4}}
    assert (market.on_demand, market.quotas) == ({}, {})
    assert market.used == {"L-DB2E81BA": 4, "L-3819A6DF": 8}
    told = "\n".join(market.notes)
    assert "on-demand prices unknown" in told and "pricing:GetProducts" in told
    assert "quotas unknown" in told
    assert "spot price unknown in us-east-1: g6.xlarge" in told
    assert "123456789012" not in told


def test_without_credentials_nothing_is_known_and_one_line_says_so(no_aws):
    market = ask_market(Aws(REGION), ["g5.xlarge"])
    [note] = market.notes
    assert note.startswith("prices and quotas unknown: no AWS credentials were found: run `aws configure`")
    assert not market.on_demand and not market.spot


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("ExpiredToken", "have expired"),
        ("InvalidClientTokenId", "does not accept"),
        ("AccessDenied", "remote policies"),
        ("RequestLimitExceeded", "try again"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(code, told):
    sts, stub = stubbed("sts")
    stub.add_client_error("get_caller_identity", code, "The security token\nof 123456789012 is bad")
    with stub, pytest.raises(UserError, match=told) as caught:
        answering(sts=sts).check()
    assert "\n" not in str(caught.value)
    assert "123456789012" not in str(caught.value)


def test_a_region_that_is_none_is_named():
    with pytest.raises(UserError, match=r"host\.region: got 'Nowhere'"):
        compose(["host.region=Nowhere"], params=None, conf=ROOT / "conf")
