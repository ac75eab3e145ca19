"""The pipeline's stages as calls for a notebook: `lab = open_lab("digits")`, then `lab.run("train")` and so on.

A lab computes below a folder of its own, so the outputs that DVC tracks stay as they are, and nothing is
registered. Its runs are recorded in MLflow as any other.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_tuning.config import CONF, PARAMS, Config, compose, recipe_of, select
from cnn_tuning.errors import UserError
from cnn_tuning.machine import prepare_process
from cnn_tuning.stages.command import Place
from cnn_tuning.stages.lab_front import Front, running
from cnn_tuning.stages.lab_progress import one_line

if TYPE_CHECKING:
    from IPython.display import Image

    from cnn_tuning.data.packed import PackedData

# Each with the dataclass of the sections that it reads.
STAGES = {
    "fetch": "FetchConfig",
    "preprocess": "PreprocessConfig",
    "train": "TrainConfig",
    "ablate": "AblateConfig",
    "tune": "TuneConfig",
    "diagnose": "DiagnoseConfig",
    "evaluate": "EvaluateConfig",
}
DOTS_PER_INCH = 130  # of the reports' pictures
MOST_PIXELS = 900


@dataclass(frozen=True)
class Lab:
    """A configuration and the folder in which its stages read and write."""

    config: Config
    folder: Path
    overrides: tuple[str, ...] = ()

    @property
    def place(self) -> Place:
        """Return where stages read and write."""
        return Place(self.folder, self.folder, self.config.data.name)

    def run(self, *stages: str) -> None:
        """Run stages one after the other; shows what they found, and where they are while they run."""
        for name in stages:
            if name not in STAGES:
                raise UserError(f"no stage {name}: there are {', '.join(STAGES)}")
            module = import_module(f"cnn_tuning.stages.{name}")
            with one_line(self.folder / "log.txt"):
                module.run(select(getattr(module, STAGES[name]), self.config), self.place)

    def path(self, name: str) -> Path:
        """Return a file of the lab, such as results/data/images.png."""
        path = self.folder / name
        if not path.exists():
            raise UserError(f"{path} is not there: run its stage first")
        return path

    def show(self, name: str, width: int | None = None) -> Image:
        """Return a picture of the lab for the notebook, `width` pixels wide or as it was drawn."""
        from IPython.display import Image
        from PIL import Image as pictures

        path = self.path(name)
        with pictures.open(path) as picture:
            drawn = round(picture.width * 96 / DOTS_PER_INCH)
        return Image(data=path.read_bytes(), width=width or min(MOST_PIXELS, drawn))

    def table(self, name: str) -> Any:
        """Return a CSV of the lab as a pandas table."""
        import pandas

        return pandas.read_csv(self.path(name))

    def values(self, name: str) -> Any:
        """Return a JSON file of the lab."""
        return json.loads(self.path(name).read_text())

    def data(self) -> PackedData:
        """Return the prepared data."""
        from cnn_tuning.stages.lineage import prepared_data

        return prepared_data(self.place)

    def layers(self) -> str:
        """Return the network as a table: shapes, parameters, operations."""
        import torch

        from cnn_tuning.training.fit import layer_table
        from cnn_tuning.training.start import first_network, specification_of

        with torch.random.fork_rng(devices=[]):
            specification = specification_of(recipe_of(self.config), self.data().meta)
            table = layer_table(first_network(specification), specification.shape)
        layers, _, _ = table.partition("Total params")  # Lightning's other sums are about the trainer
        return layers + "Total params"

    def compare(self) -> None:
        """Print this experiment's runs of the present commit side by side, with their cost."""
        from rich.console import Console

        from cnn_tuning.reports.compared import print_compared
        from cnn_tuning.stages.compare import compared

        rows = compared(self.config.tracking, experiment=self.config.experiment)
        # As text: rich's table for notebooks has a frame and a style of its own a line.
        print_compared(rows, Console(highlight=False, markup=False, width=120, force_jupyter=False))

    def variant(self, name: str, *overrides: str) -> Lab:
        """Return a lab beside this one, in a folder of this name, with other values."""
        return _composed(self.folder / name, (*self.overrides, *overrides))

    def learning_curves(self, model: str = "baseline") -> Image:
        """Return the learning curves of a model: baseline or tuned."""
        from cnn_tuning.reports.plots import learning_curves

        drawn = f"results/{model}_curves.png"
        learning_curves(self.path(f"models/{model}/history.csv"), self.folder / drawn)
        return self.show(drawn)

    def validation(self, model: str = "baseline", confidence: float = 0.95) -> str:
        """Return the kept epoch's training and validation accuracy in words, the latter with its interval."""
        from cnn_tuning.statistics import share_interval

        best, images = self.values(f"models/{model}/best.json"), sum(self.data().meta.counts["val"])
        found = share_interval(round(best["val/accuracy"] * images), images, confidence)
        return (
            f"training accuracy {best['train/accuracy']:.2%}; validation accuracy {found.value:.2%} of {images:,} "
            f"images, {100 * confidence:g} % interval {found.low:.2%} to {found.high:.2%}"
        )

    def arms(self, question: str) -> Any:
        """Return an ablation's arms as a table: means and, after ±, standard deviations over seeds."""
        from cnn_tuning.reports.scales import dollars

        arms = self.table(f"results/ablation/{question}/arms.csv").set_index("arm")
        shown = arms[["seeds"]].copy()
        shown["validation accuracy, %"] = _spread(100 * arms["val_accuracy"], 100 * arms["val_accuracy_std"])
        shown["gap to training, points"] = _spread(100 * arms["gap"], 100 * arms["gap_std"])
        shown["seconds"] = arms["seconds"].round(1)
        shown["$ a training"] = arms["usd"].map(dollars)
        return shown

    def findings(self, model: str = "baseline") -> Any:
        """Return what the rules find in a model's training, for the notebook."""
        from html import escape

        from IPython.display import HTML

        from cnn_tuning.diagnosis.findings import patch_text
        from cnn_tuning.diagnosis.judge import diagnose
        from cnn_tuning.diagnosis.source import training_in
        from cnn_tuning.reports.findings import evidence_text

        sheet = {"baseline": self.place.training, "tuned": self.place.refit}[model]
        training = training_in(self.path(f"models/{model}"), self.folder / sheet)
        _, findings = diagnose(training.recording, self.config.diagnosis, training.recipe, self.data())
        fired = [finding for finding in findings if finding.status == "fired"]
        rows = [
            f"<p><b>{escape(f.rule.replace('_', ' '))}</b>: {escape(f.explanation)}<br>"
            f"<small>{escape(evidence_text(f.evidence))}</small><br>{escape(f.advice)}"
            + (f"<br><code>{escape(patch_text(f))}</code>" if f.remedy else "")
            + "</p>"
            for f in fired
        ]
        return HTML(f"<p>{len(fired)} of {len(findings)} rules fired.</p>{''.join(rows)}")

    def picture_and_answer(self, picture: Any, answer: dict[str, Any]) -> Image:
        """Return a picture beside the classes that a front named for it."""
        from cnn_tuning.reports.plots import answer as draw

        choices = answer["predictions"][0]["top_k"]
        drawn = self.folder / "results/answer.png"
        draw(picture, [c["label"] for c in choices], [c["probability"] for c in choices], drawn)
        return self.show("results/answer.png")

    def serve(self, model: str = "baseline") -> AbstractContextManager[Front]:
        """Answer over HTTP with a model, in a process of its own, until the `with` block ends."""
        return running(self.path(f"models/{model}"), self.folder / "serving.log")


def open_lab(experiment: str, *overrides: str, folder: Path = Path("scratch/notebook")) -> Lab:
    """Go to the project's root, wherever the notebook stands, and compose an experiment without params.yaml."""
    above = (Path.cwd(), *Path.cwd().parents)
    root = next((place for place in above if (place / CONF).is_dir() and (place / PARAMS).is_file()), None)
    if root is None:
        raise UserError(f"{Path.cwd()} is in no project: open the notebook in the folder that it came in")
    os.chdir(root)
    prepare_process()
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's wish for a widget that nothing here shows
    return _composed(folder / experiment, (f"experiment={experiment}", *overrides))


def _composed(folder: Path, overrides: tuple[str, ...]) -> Lab:
    config = compose(overrides, params=None)
    folder.mkdir(parents=True, exist_ok=True)
    return Lab(config, folder, overrides)


def _spread(means: Any, deviations: Any) -> list[str]:
    return [f"{mean:.2f} ± {std:.2f}" for mean, std in zip(means, deviations, strict=True)]
