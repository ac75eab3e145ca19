"""What people read: `UserError` (what is wrong, where, what to do instead); `redact` keeps secrets out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"

# `cnn_tuning.token` and HF_TOKEN are secrets; `tokenizer` and `max_tokens` are not.
_NAME = re.compile(
    r"(?i)(?:^|[._\-\s])(?:\w*?[_-])?(?:secret|token|password|passwd|passphrase|signature|credentials?|api_?key"
    r"|access_?key|private_?key|account_?key|secret_?key|connection_?string)(?:$|[._\-])|[a-z](?:Secret|Token|Password|ApiKey)$"
)
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://)[^\s/@'\"]*:?[^\s/'\"]*@")
_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s/:@'\"]*:([^\s/'\"]+)@")
_ASSIGNED = re.compile(r"([A-Za-z][\w.\-]*)([\"']?\s*(?:=|:)\s*[\"']?)([^\s\"',;&}\])]+)")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=\-]{16,}")
_KNOWN_FORMS = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|hf_[A-Za-z0-9]{20,}"
    r"|glpat-[\w\-]{16,}|xox[abpr]-[\w\-]{10,}|sk-[\w\-]{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
)
_told: set[str] = set()


class UserError(Exception):
    """A mistake or a condition a person can act on; commands print its text in one line and exit 1."""

    def __init__(self, text: str) -> None:
        super().__init__(redact(text))


class CutOff(UserError):
    """Work that was cut off from outside: its run is not over, the same command goes on with both."""


def hide(text: str) -> None:
    """Remember the password inside a URI, so that `redact` finds it in whatever form it turns up."""
    _told.update(_PASSWORD.findall(text))


def is_secret_name(name: str) -> bool:
    """Say whether a value under this name (AWS_SECRET_ACCESS_KEY, hf_token, …) must never be shown."""
    return _NAME.search(name) is not None


def redact(text: str) -> str:
    """Return `text` with `***` in place of secrets.

    Secrets are: user and password of a URI, `NAME=value` and `name: value` under a secret's name, bearer
    tokens, well-known key forms, and the values (8 characters or more) that environment variables with a
    secret's name hold now.
    """
    for secret in sorted(set(_environment()) | _told, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    text = _KNOWN_FORMS.sub(HIDDEN, text)
    return _ASSIGNED.sub(lambda m: f"{m[1]}{m[2]}{HIDDEN}" if is_secret_name(m[1]) else m[0], text)


def redact_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat mapping with its secrets hidden, by name or by form; None and empty stay."""
    return {
        key: HIDDEN if is_secret_name(key) and value not in (None, "") else _redact_any(value)
        for key, value in values.items()
    }


def _redact_any(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return redact_values(value)
    if isinstance(value, list | tuple):
        return [_redact_any(item) for item in value]
    return value


def _environment() -> Iterator[str]:
    for name, value in os.environ.items():
        # Short values ("test", "token") would blank out ordinary words.
        if len(value) >= 8 and is_secret_name(name):
            yield value
        if "://" in value:
            yield from (password for password in _PASSWORD.findall(value) if len(password) >= 8)
