"""A campaign: runs of the whole pipeline, each hit at a random moment by a random fault, then started again.

    python bench/chaos.py --runs 50 --seed 0 --out scratch/chaos.jsonl
    python bench/chaos.py --runs 7 --only cut,disk --keep         (some faults; keep the folders)
    python bench/chaos.py --first 25 --out scratch/more.jsonl     (half of them beside the other half)

Moments are uniform over an undisturbed run (fetch from S3, pipeline, push, pull in a clone). What must hold is in
`chaos_checks`; what does not is a loss. Results go to a file of JSON lines, from which the same command goes on; a
run is repeated where the code has changed since. A full disk needs root (it mounts a tmpfs); the clock jumps
where libfaketime is found (Debian's package, Python's, or FAKETIME_LIBRARY), else the files' times do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import chaos_checks as checks
from chaos_faults import FAULTS, OF_S3, OF_STORE, folder_of
from chaos_place import Place, Workshop
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from workplace import ROOT, machine

TRIES = 5
LOOK_EVERY_S = 0.02
Course = list[tuple[str, float]]  # the parts of an undisturbed run in order, with their seconds


def main() -> int:
    """Run the campaign and print its table; exit status 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="begin with this one, not run 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "scratch/chaos.jsonl")
    parser.add_argument("--only", default=",".join(FAULTS), help=f"faults to draw from: {', '.join(FAULTS)}")
    parser.add_argument("--commit", default="HEAD", help="whose code is struck; '' for the working tree's")
    parser.add_argument("--keep", action="store_true", help="keep every run's folder, not only a lossy one's")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    options.out = options.out.resolve()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in options.only.split(",") if kind in FAULTS]
    if "disk" in kinds and os.getuid():
        print("no full disks: mounting a small one needs root")
        kinds.remove("disk")
    shop = Workshop(options.out.with_suffix(""), options.commit)
    code, done = shop.code, {}
    if options.out.exists():
        lines = map(json.loads, options.out.read_text().splitlines())
        done = {line["run"]: line for line in lines if (line["seed"], line["code"]) == (options.seed, code)}
    left = [number for number in range(options.first, options.runs) if number not in done]
    try:
        if left:
            shop.open()
            undisturbed = reference(shop)
            print(f"{machine()}; undisturbed: {undisturbed['seconds']:.0f} s, {undisturbed['cpu']:.0f} s of CPU")
        began = time.monotonic()
        for index, number in enumerate(left):
            rng = random.Random(f"{options.seed}/{number}")
            kind = drawn(kinds, options.seed, number)
            result = {"run": number, "seed": options.seed, "code": code, "fault": kind}
            result |= one(shop, number, kind, rng, undisturbed, keep=options.keep)
            done[number] = result
            with options.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            tell(result, (time.monotonic() - began) / (index + 1) * (len(left) - index - 1))
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on with what is left")
    finally:
        shop.close()
    results = [done[number] for number in sorted(done) if number < options.runs]
    show(results)
    return int(any(result["losses"] for result in results))


def drawn(kinds: list[str], seed: int, number: int) -> str:
    """Return a run's fault: each round over all of them is in an order of its own, so that none is left out."""
    turn, place = divmod(number, len(kinds))
    order = list(kinds)
    random.Random(f"{seed}/{turn}/order").shuffle(order)
    return order[place]


def reference(shop: Workshop) -> dict[str, Any]:
    """Return course, results and answers of an undisturbed run; run once for a code."""
    file = shop.template / "reference.json"
    if file.exists():
        return json.loads(file.read_text())
    with folder_of(shop.folder / "undisturbed", small=False) as folder:
        place = shop.place(folder)
        began, spent = time.monotonic(), cpu_seconds()
        course = follow(place)
        if place.wait() != 0:
            sys.exit(f"the undisturbed run failed: {place.tell()}")
        store = shop.store(place)
        whole = {
            "seconds": time.monotonic() - began,
            "cpu": cpu_seconds() - spent,
            "course": course,
            "orphans": place.orphans(),
            "results": checks.results(place.project),
            "answers": checks.answers(place, f"sqlite:///{store}"),
            "curve": checks.curve(store),
            "temporary": checks.temporary_files(place.folder),
        }
    whole["losses"] = checks.left_running(store, place.project) + checks.false_claims(place.project)
    file.write_text(json.dumps(whole))
    shutil.rmtree(place.folder)
    return whole


def follow(place: Place) -> Course:
    """Run the pipeline and return when each part began, as seconds of each."""
    place.start()
    began, seen = time.monotonic(), [("", 0.0)]
    assert place.process is not None
    while place.process.poll() is None:
        part = place.reached()
        if part != seen[-1][0]:
            seen.append((part, time.monotonic() - began))
        time.sleep(LOOK_EVERY_S)
    ends = [at for _, at in seen[1:]] + [time.monotonic() - began]
    return [(part, end - at) for (part, at), end in zip(seen, ends, strict=True) if part]


def moment(kind: str, course: Course, rng: random.Random) -> tuple[str, float]:
    """Return a part of the pipeline and seconds into it: uniform over what the fault can touch."""
    touched = {"s3": OF_S3, "tracking": OF_STORE}.get(kind)
    parts = [(part, seconds) for part, seconds in course if touched is None or part in touched]
    at = rng.uniform(0, sum(seconds for _, seconds in parts))
    for part, seconds in parts:
        if at < seconds:
            return part, at
        at -= seconds
    return parts[-1][0], parts[-1][1]


def until(place: Place, part: str, offset: float, course: Course) -> bool:
    """Wait for the moment; True if the pipeline is still under way then."""
    order = [name for name, _ in course]
    assert place.process is not None
    arrived: float | None = None
    while place.process.poll() is None:
        here = place.reached()
        if here in order and order.index(here) > order.index(part):
            return True  # it was faster than the undisturbed one
        if arrived is None and here == part:
            arrived = time.monotonic()
        if arrived is not None and time.monotonic() - arrived >= offset:
            return True
        time.sleep(LOOK_EVERY_S)
    return False


def one(
    shop: Workshop, number: int, kind: str, rng: random.Random, undisturbed: dict[str, Any], *, keep: bool
) -> dict[str, Any]:
    """Run, strike, mend, start again until it ends, and check; return the result's fields."""
    course = undisturbed["course"]
    part, offset = moment(kind, course, rng)
    began, spent, losses = time.monotonic(), cpu_seconds(), []
    with folder_of(shop.folder / f"run-{number}", small=kind == "disk") as folder:
        place = shop.place(folder, tracked=kind == "tracking", clock=kind == "clock")
        try:
            place.start()
            in_time = until(place, part, offset, course)
            here = place.reached()
            struck = FAULTS[kind](place, shop, rng)
            status = place.wait()
            struck.mend()
            losses += [f"after the strike: {p}" for p in checks.false_claims(place.project, cut=struck.cut)]
            retries = 0
            while status != 0 and retries < TRIES:
                retries += 1
                place.start()
                status = place.wait()
                losses += [f"after try {retries}: {p}" for p in checks.false_claims(place.project)]
            if status != 0:
                losses.append(f"does not end after {retries} more tries: {place.tell()}")
            else:
                losses += at_the_end(shop, place, kind, undisturbed, retries)
        finally:
            place.end()
        if losses or keep:
            kept = shop.folder / f"kept-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept, symlinks=True, ignore=shutil.ignore_patterns("filler", "*.sock"))
        if kind == "tracking" and shop.mlflow is not None:
            shop.mlflow.kill()
            shop.mlflow = None
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "at": f"{here or 'start'} (aimed at {part} + {offset:.1f} s)",
        "told": struck.told if in_time else f"{struck.told} (too late)",
        "in_time": in_time,
        "retries": retries,
        "seconds": round(time.monotonic() - began, 1),
        "cpu": round(cpu_seconds() - spent, 1),
        "losses": losses,
    }


def at_the_end(shop: Workshop, place: Place, kind: str, undisturbed: dict[str, Any], retries: int) -> list[str]:
    """Return what does not hold once the pipeline has ended."""
    losses = [f"orphan: {told}" for told in place.orphans()]
    store, uri = shop.store(place), f"sqlite:///{shop.store(place)}"
    if kind == "tracking":
        synced = place.run("cnn-tuning", "sync")
        if synced is not None:
            losses.append(f"sync: {synced}")
        losses += [f"orphan after sync: {told}" for told in place.orphans()]
        uri = place.environment["MLFLOW_TRACKING_URI"]
    losses += checks.differences(undisturbed["results"], checks.results(place.project))
    losses += checks.left_running(store, place.project)
    losses += checks.false_claims(place.project)
    # A stage that had ended, but not for DVC when that was killed, runs again: one more whole run a try.
    curve, whole = checks.curve(store), undisturbed["curve"]
    if set(curve) != set(whole) or not len(whole) <= len(curve) <= len(whole) + retries:
        losses.append(f"the store has {curve} epochs of the models' trainings, not {whole}")
    told = checks.answers(place, uri)
    if told != undisturbed["answers"]:
        losses.append(f"the champion answers otherwise: {str(told)[:200]}")
    left = checks.temporary_files(place.folder)
    losses += [f"temporary file {name}" for name in left if name not in undisturbed["temporary"]]
    return losses


def cpu_seconds() -> float:
    """Return the CPU seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tell(result: dict[str, Any], left_s: float) -> None:
    """Print one run's line."""
    lost = f"LOST {len(result['losses'])}" if result["losses"] else "nothing lost"
    print(
        f"run {result['run']}: {result['told']} in {result['at']}; {result['retries']} more tries, "
        f"{result['seconds']:.0f} s; {lost}; {left_s / 60:.0f} min left"
    )
    for loss in result["losses"]:
        print(f"    {loss}")


def show(results: list[dict[str, Any]]) -> None:
    """Print the table: runs and losses by kind of fault."""
    table = Table(box=MARKDOWN)
    for title in ("fault", "runs", "struck in time", "runs with losses", "more tries", "seconds a run", "CPU s"):
        table.add_column(title, justify="left" if title == "fault" else "right", no_wrap=True)
    counts = Counter(result["fault"] for result in results)
    for kind in [*(kind for kind in FAULTS if counts[kind]), "all"]:
        mine = [result for result in results if kind in ("all", result["fault"])]
        table.add_row(
            kind,
            str(len(mine)),
            str(sum(result["in_time"] for result in mine)),
            str(sum(bool(result["losses"]) for result in mine)),
            str(sum(result["retries"] for result in mine)),
            f"{sum(result['seconds'] for result in mine) / max(1, len(mine)):.0f}",
            f"{sum(result['cpu'] for result in mine) / max(1, len(mine)):.0f}",
        )
    Console(width=160, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
