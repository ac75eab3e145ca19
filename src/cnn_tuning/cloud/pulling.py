"""What `dvc.lock` names comes from DVC's remote onto a host, whole or not at all: what is damaged is named.

`dvc pull --allow-missing` alone leaves out an output of which an object is damaged and succeeds; it takes a
folder's listing as it comes, and the stages would be computed again, or on other data.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cnn_tuning.cloud.aws import hide_account
from cnn_tuning.cloud.runfolder import RunFolder
from cnn_tuning.cloud.supply import remote_url
from cnn_tuning.errors import UserError

CACHE = Path(".dvc/cache/files/md5")
SHOWN = 5
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
_FAILED = re.compile(r"failed to transfer '([0-9a-f]{32}(?:\.dir)?)'")


@dataclass(frozen=True)
class Lacking:
    """An object that did not come: of an output, or of a file below it. `whole`: it is the output itself."""

    path: str
    md5: str
    whole: bool

    @property
    def name(self) -> str:
        """Return its name below the remote's address."""
        return f"files/md5/{self.md5[:2]}/{self.md5[2:]}"


def pull(project: Path, region: str) -> None:
    """Pull what the remote has of the outputs in `dvc.lock`; what it never had is made by the stages.

    Raises:
        UserError: an object is damaged, or missing in a folder that is there; the remote cannot be read.
    """
    if any(_lacking(project)):  # DVC takes long to say why a remote does not answer
        RunFolder.at(remote_url(project), region, patient=False).check()
    done = subprocess.run(["dvc", "pull", "--allow-missing"], cwd=project, stderr=subprocess.PIPE, text=True)
    lacking = list(_lacking(project))
    if done.returncode or lacking:
        url = remote_url(project)
        faults = list(islice(_faults(RunFolder.at(url, region), url, lacking, done.stderr), SHOWN))
        if faults:
            raise UserError(
                "; ".join(faults) + ": remove what is damaged there, then `dvc push` from where the data are whole"
            )
    if done.returncode:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(hide_account(f"dvc pull: {errors[0] if errors else 'no reason given'}"))


def _faults(remote: RunFolder, url: str, lacking: list[Lacking], errors: str) -> Iterator[str]:
    """Yield what is wrong with objects that did not come: looked at, one by one, in the remote."""
    failed = set(_FAILED.findall(errors))
    for item in lacking:
        found = remote.md5_of(item.name)
        if found == item.md5.removesuffix(".dir"):
            if item.whole and item.md5.endswith(".dir"):  # the listing is whole: then something below it is not
                below = [
                    Lacking(f"{item.path}/{e['relpath']}", e["md5"], False) for e in remote.get_json(item.name)
                ]
                yield from _faults(remote, url, [one for one in below if one.md5 in failed], "")
        elif found is not None or not item.whole:
            what = "missing" if found is None else "damaged (its hash differs)"
            yield f"{item.path}: object {url}/{item.name} is {what}"


def _lacking(project: Path) -> Iterator[Lacking]:
    """Yield the objects of `dvc.lock` that are not in DVC's cache with their own content."""
    import yaml

    lock = project / "dvc.lock"
    told = yaml.safe_load(lock.read_text()) if lock.is_file() else {}
    for stage in ((told or {}).get("stages") or {}).values():
        for out in stage.get("outs", ()):
            path, md5 = str(out["path"]), str(out.get("md5", ""))
            if not _MD5.fullmatch(md5):
                continue
            cached = _cached(project, md5)
            if not cached.is_file():
                yield Lacking(path, md5, whole=True)
            elif md5.endswith(".dir"):
                yield from _lacking_below(project, path, md5, cached.read_bytes())


def _lacking_below(project: Path, path: str, md5: str, listing: bytes) -> Iterator[Lacking]:
    # DVC checks what it fetches (`verify`), but not the listings of folders.
    if hashlib.md5(listing, usedforsecurity=False).hexdigest() != md5.removesuffix(".dir"):
        yield Lacking(path, md5, whole=False)
        return
    for entry in json.loads(listing):
        if not _cached(project, entry["md5"]).is_file():
            yield Lacking(f"{path}/{entry['relpath']}", entry["md5"], whole=False)


def _cached(project: Path, md5: str) -> Path:
    return project / CACHE / md5[:2] / md5[2:]
