"""End the run of a trial whose worker is gone: what became of the trial comes in, the run's last events go out.

The deliverer would only find that a process ended without a word, and of another host's not even that.
"""

from __future__ import annotations

from pathlib import Path

from cnn_tuning.search.study import BEGAN_S, TakenAs

# Of a run whose trial was failed, tried again, or waits because the search itself ends.
TAGS: dict[TakenAs, str] = {"failed": "failed", "lost": "lost", "waits": "interrupted"}


def end_run(spool: Path, worker: str, number: int, became: TakenAs, reason: str) -> None:
    """End the run that a dead worker (its name) left open of a trial, where it is in this spool."""
    from cnn_tuning.tracking.spool import Writer, is_ending, keys, opening_of, read, spent

    host, pid, created = worker.rsplit(":", 2)
    for key in keys(spool):
        start = opening_of(spool, key)
        if start is None or start["tags"].get("trial.number") != str(number) or is_ending(spool, key):
            continue
        same = (start["host"], str(start["pid"])) == (host.partition("/")[0], pid)
        if not same or abs(start["created"] - float(created)) > BEGAN_S:
            continue
        run = Writer(spool, key)
        seconds, usd = spent(event for event, _ in read(run.path, 0))
        run.append("metrics", step=0, values={"time/seconds": seconds, "cost/usd": usd})
        tags = {"trial.state": TAGS[became], **({"trial.reason": reason} if reason else {})}
        run.append("tags", values=tags)
        run.append("finish", status="FAILED" if became == "failed" else "KILLED", error=reason)
        run.close()
