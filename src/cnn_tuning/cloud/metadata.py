"""The instance metadata service, by IMDSv2: a path goes in, its text comes out, or None.

A service that refuses, hangs or is not there is no fault: nothing is known then, and the work goes on.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

ADDRESS = "http://169.254.169.254"
TOKEN_S = 21600
TIMEOUT_S = 2.0


@dataclass
class Metadata:
    """The service at an address; the token is asked for when it is needed, and again when it is refused."""

    address: str = field(default_factory=lambda: os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ADDRESS)
    _token: str = field(default="", repr=False)
    _expires: float = 0.0

    def read(self, path: str) -> str | None:
        """Return what stands at `latest/meta-data/PATH`; None where nothing does, or nobody answers."""
        import httpx

        try:
            # Link-local: never through a proxy.
            with httpx.Client(timeout=TIMEOUT_S, trust_env=False, base_url=self.address) as client:
                for _ in range(2):
                    answer = client.get(f"/latest/meta-data/{path}", headers=self._headers(client))
                    if answer.status_code != 401:
                        break
                    self._expires = 0.0
                return answer.text if answer.status_code == 200 else None
        except (httpx.HTTPError, httpx.InvalidURL):
            return None

    def notice(self) -> datetime | None:
        """Return when EC2 takes this spot host away; None: it has not said so."""
        told = self.read("spot/instance-action")
        try:
            said: dict[str, Any] = json.loads(told) if told else {}
            return datetime.fromisoformat(said["time"]) if said.get("action") in _ENDS else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _headers(self, client: Any) -> dict[str, str]:
        if time.monotonic() >= self._expires:
            asked = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
            answer = client.put("/latest/api/token", headers=asked).raise_for_status()
            self._token, self._expires = answer.text, time.monotonic() + TOKEN_S / 2
        return {"X-aws-ec2-metadata-token": self._token}


_ENDS = ("terminate", "stop", "hibernate")
