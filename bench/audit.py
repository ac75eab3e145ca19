"""Known holes in the locked packages, secrets in the files that Git has, unsafe Python: `make audit`.

pip-audit asks PyPI's vulnerability data about packages. Where those do not answer, or know none of them, this says
so and goes on: nobody is held up by a network. Secrets are new ones beside `.secrets.baseline` (tests' examples);
`detect-secrets scan --baseline .secrets.baseline` notes another, after a look. Exit status 1 on any finding.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LOCK, BASELINE = "requirements.lock", ".secrets.baseline"
# Files of digests and pictures: long random-looking texts by nature.
NOT_READ = (".lock", ".png", ".baseline", "params.lock.yaml")
MOVED = 3  # of detect-secrets-hook: known secrets stand in other lines now; the baseline is brought up to date


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of the tools in the project's top folder."""
    return subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)


def packages() -> list[str]:
    """Return known vulnerabilities of the locked packages; say how many could be asked about."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "audit.json"
        done = run("pip-audit", "-r", LOCK, "--no-deps", "--disable-pip", "-f", "json", "-o", str(out),
                   "--progress-spinner", "off", "--timeout", "10")  # fmt: skip
        if not out.exists() or not out.stat().st_size:
            reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            print(f"packages: NOT CHECKED, the vulnerability data cannot be reached ({reason[:200]})")
            return []
        found = json.loads(out.read_text())["dependencies"]
    known = [package for package in found if "vulns" in package]
    if not known:
        print(f"packages: NOT CHECKED, the vulnerability data here know none of {len(found)}")
        return []
    print(f"packages: {len(known)} of {len(found)} in {LOCK} checked")
    return [
        f"{package['name']} {package['version']}: {hole['id']}, mended in {hole['fix_versions'] or 'no version'}"
        for package in known
        for hole in package["vulns"]
    ]


def secrets() -> list[str]:
    """Return secrets in files that Git has or would take, beside those of the baseline."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [name for name in listed.stdout.split("\0") if name and not name.endswith(NOT_READ)]
    files = [name for name in files if (ROOT / name).is_file()]
    done = run("detect-secrets-hook", "--baseline", BASELINE, "--json", *files)
    print(f"secrets: {len(files)} files read")
    if done.returncode in (0, MOVED):
        return []
    try:
        results = json.loads(done.stdout)["results"]
    except (ValueError, KeyError):
        return [f"detect-secrets failed: {(done.stderr or done.stdout).strip()[-300:]}"]
    return [f"{name}:{one['line_number']}: {one['type']}" for name, every in results.items() for one in every]


def code() -> list[str]:
    """Return what ruff's security rules (those of bandit) say of the product."""
    # Left out as in pyproject.toml: assert, and subprocesses, which are started with fixed argument lists.
    left_out = ("--ignore", "S101,S603,S607")
    done = run("ruff", "check", "--select", "S", *left_out, "--output-format", "concise", "src")
    print("code: ruff's security rules over src")
    return done.stdout.splitlines()[:-1] if done.returncode else []


def main() -> int:
    """Run all three and print what was found."""
    found = [*packages(), *secrets(), *code()]
    for finding in found:
        print(f"  FOUND {finding}")
    print(f"{len(found)} findings" if found else "no findings")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
