"""How every stage is run: `python -m cnn_tuning.stages.NAME --locked`, or by hand with overrides.

With `--locked` (as `dvc.yaml` calls it) a stage reads its sections from `params.lock.yaml` and writes the
pipeline's outputs. By hand it composes `params.yaml`, `conf/` and the overrides itself, reads its inputs
below `--inputs` and writes below `--outputs`, so the outputs that DVC tracks stay as they are.
"""

from __future__ import annotations

import errno
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cnn_tuning.errors import UserError
from cnn_tuning.machine import prepare_process


@dataclass(frozen=True)
class Place:
    """Where a stage reads and writes. `data_name`: the data set composed by hand (None with `--locked`)."""

    inputs: Path
    outputs: Path
    data_name: str | None = None

    def input(self, path: Path) -> Path:
        """Return where an input is: below `inputs` if it stands there, else where the pipeline keeps it."""
        chosen = self.inputs / path
        return chosen if chosen.exists() else path

    @property
    def top(self) -> Path:
        """Return the folder of the baseline that `evaluate` and `diagnose` judge.

        What belongs to it stands below the same: by hand, the pipeline's results may be another experiment's.
        """
        return self.inputs if (self.inputs / self.baseline).exists() else Path()

    def beside_baseline(self, path: Path) -> Path:
        """Return where an input is: below `inputs` if it stands there, else beside the baseline."""
        chosen = self.inputs / path
        return chosen if chosen.exists() else self.top / path

    @property
    def raw(self) -> Path:
        """Return where `fetch` writes and `preprocess` reads."""
        return Path("data/raw")

    @property
    def prepared(self) -> Path:
        """Return where `preprocess` writes."""
        return Path("data/prepared")

    @property
    def baseline(self) -> Path:
        """Return where `train` writes."""
        return Path("models/baseline")

    @property
    def training(self) -> Path:
        """Return where `train` writes what differs from one run to the next: times, profile."""
        return Path("results/training")

    @property
    def tuned(self) -> Path:
        """Return where `tune` writes the refitted best."""
        return Path("models/tuned")

    @property
    def ablation(self) -> Path:
        """Return where `ablate` writes."""
        return Path("results/ablation")

    @property
    def search(self) -> Path:
        """Return where `tune` writes what it tried."""
        return Path("results/search")

    @property
    def refit(self) -> Path:
        """Return where `tune` writes the times and the profile of the refit."""
        return Path("results/search/refit")

    @property
    def diagnosis(self) -> Path:
        """Return where `diagnose` writes."""
        return Path("results/diagnosis")

    @property
    def evaluation(self) -> Path:
        """Return where `evaluate` writes."""
        return Path("results/evaluation")

    @property
    def state(self) -> Path:
        """Return where unfinished work waits to be continued."""
        return Path(".state")

    @property
    def is_pipeline(self) -> bool:
        """Tell whether the outputs are those that DVC tracks."""
        return self.data_name is None


def stage(kind: type, run: Callable[[Any, Place], None], about: str) -> None:
    """Run one stage as a command; `kind` is the dataclass of the sections it reads."""
    prepare_process()
    # As after Ctrl-C, what is open is left in good order: temporary files, workers, the run.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))

    @click.command(help=about + "\n\nOVERRIDES are Hydra's, such as model=lab_cnn trainer.max_epochs=1.")
    @click.argument("overrides", nargs=-1)
    @click.option("--locked", is_flag=True, help="Read params.lock.yaml, write the pipeline's outputs.")
    @click.option(
        "--inputs", type=click.Path(path_type=Path), default=Path(), help="Read below here what is there."
    )
    @click.option("--outputs", type=click.Path(path_type=Path), default=Path("scratch"), help="Write below here.")
    def command(overrides: tuple[str, ...], locked: bool, inputs: Path, outputs: Path) -> None:
        from cnn_tuning import config  # not for `--help`: half of its time

        if locked and overrides:
            raise UserError("--locked takes no overrides: edit params.yaml, or leave --locked out")
        if locked:
            run(config.load_locked(kind), Place(Path(), Path()))
        else:
            whole = config.compose(overrides)
            run(config.select(kind, whole), Place(inputs, outputs, whole.data.name))

    run_command(command, _told_of)


def _told_of(error: BaseException) -> str | None:
    """Return what to say of a condition of the machine that stopped a stage; None for any other error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            place = seen.filename or _full_place()
            return f"{place}: {seen.strerror}; make room, the same command goes on from there"
        if isinstance(seen, RuntimeError) and str(seen).startswith("DataLoader worker"):
            remedy = "close other programs, or set trainer.workers: 0; the same command goes on from there"
            return f"{str(seen).splitlines()[0].strip().rstrip('.')} (out of memory?): {remedy}"
        seen = seen.__cause__ or seen.__context__
    return None


def _full_place() -> Path:
    """Return where the disk is full: a write, unlike an opening, does not say which file it was."""
    places = [Path(name) for name in (".state", "data", "models", "results", "scratch")]
    places = [Path.cwd(), *(Path.cwd() / place for place in places if place.exists()), Path(tempfile.gettempdir())]
    return min(places, key=lambda place: shutil.disk_usage(place).free)


def empty_folder(folder: Path) -> None:
    """Make an empty folder, or say that it cannot be written before any work is done."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / ".probe").touch()
        (folder / ".probe").unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): mend its permissions first") from None


def gather_plots(out: Path) -> None:
    """Copy the pictures below an output into its folder `plots`, which `dvc plots` shows as a whole."""
    pictures = sorted(out.rglob("*.png"))
    (out / "plots").mkdir()
    for picture in pictures:
        shutil.copyfile(picture, out / "plots" / "-".join(picture.relative_to(out).parts))


def run_command(command: click.Command, told_of: Callable[[BaseException], str | None] = lambda _: None) -> None:
    """Run a click command; a `UserError` is printed without a traceback, with exit status 1.

    So is another error of which `told_of` knows what to say.
    """
    try:
        command(standalone_mode=False)
    except UserError as error:
        sys.exit(f"error: {error}")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except Exception as error:
        if said := told_of(error):
            sys.exit(f"error: {said}")
        raise
