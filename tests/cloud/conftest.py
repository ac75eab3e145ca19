"""What tests of hosts share with those of faults."""

from renting import _price_server, _shared, aws, command, credentials, folder, images, no_aws, prices  # noqa: F401
