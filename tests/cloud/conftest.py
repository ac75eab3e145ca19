"""What tests of hosts share with those of faults."""

from datetime import UTC, datetime

import pytest
from played_host import played  # noqa: F401
from renting import (  # noqa: F401
    REGION,
    _price_server,
    _shared,
    aws,
    command,
    credentials,
    folder,
    images,
    intercept,
    no_aws,
    prices,
    project,
)

SPOT = {
    "g4dn.xlarge": {"a": "0.21", "b": "0.19"},
    "g5.xlarge": {"a": "0.4", "b": "0.45"},
    "g6.xlarge": {"b": "0.3"},
}


@pytest.fixture
def spot(aws):  # noqa: F811
    """Spot prices in two zones that stay as they are."""
    rows = [
        {"InstanceType": kind, "AvailabilityZone": REGION + zone, "SpotPrice": usd, "Timestamp": datetime.now(UTC)}
        for kind, prices_ in SPOT.items()
        for zone, usd in prices_.items()
    ]
    stop = intercept(aws.client("ec2"), "DescribeSpotPriceHistory", lambda _: {"SpotPriceHistory": rows})
    yield
    stop()
