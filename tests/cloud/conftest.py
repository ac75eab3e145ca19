"""What tests of hosts share with those of faults."""

import subprocess
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
)

WHO = ("-c", "user.name=t", "-c", "user.email=t@example.org")
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


@pytest.fixture
def project(folder, images):  # noqa: F811
    """A project with a commit and a DVC remote, whose images are counted; nothing of it was run yet."""
    lines = "experiment: mnist\ndata: {limit: 60000}\nsearch: none\nablation: none\n"
    host = "host: {bucket: a-bucket, gpu_ami: /gpu, cpu_ami: /cpu, candidates: [g5.xlarge, p3.2xlarge]}\n"
    (folder / "params.yaml").write_text(lines + host)
    (folder / ".dvc").mkdir()
    remote = "['remote \"storage\"']\n    url = s3://a-bucket/cnn-tuning/dvc\n    region = us-east-1\n"
    (folder / ".dvc/config").write_text(f"[core]\n    remote = storage\n    analytics = false\n{remote}")
    for command_ in (("init", "-q"), ("add", "-A"), (*WHO, "commit", "-qm", "start")):
        subprocess.run(["git", *command_], cwd=folder, check=True)
    return folder
