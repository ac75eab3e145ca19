"""Any classifier of timm or torchvision by name, with a new head: logits out, in training auxiliary ones, too.

The library's network without its last layer is the trunk, which gives pooled features; nothing is downloaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from cnn_tuning.errors import UserError
from cnn_tuning.models.network import drop

LIBRARIES = ("timm", "torchvision")
# Modules that only hold the stages of a trunk.
CONTAINERS = frozenset({"blocks", "encoder", "features", "layers", "levels", "stages"})
AUXILIARY = ("AuxLogits", "aux1", "aux2")
AUXILIARY_LOGITS = ("AuxLogits.fc.", "aux1.fc2.", "aux2.fc2.")
# Below it, the auxiliary branch of Inception v3 has no pixel left.
AUXILIARY_SIDE = {"inception_v3": 299, "googlenet": 224}


class Backbone(nn.Module):
    """Trunk, then head. In training, a trunk with auxiliary branches gives (logits, auxiliary logits, …)."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits for normalised pixels."""
        found = self.trunk(pixels)
        if not isinstance(found, tuple):
            return self.head(found)
        features, *auxiliary = found
        return (self.head(features), *(logits for logits in auxiliary if logits is not None))

    def stages(self) -> list[list[str]]:
        """Return the trunk's stages from the pictures to the head, each as names of its modules.

        Auxiliary branches belong to none: like the head, they are new.
        """
        found: list[list[str]] = []
        for name, module in _parts(self.trunk):
            shapes = [parameter.ndim for parameter in module.parameters()]
            if not shapes or name in AUXILIARY:
                continue
            if max(shapes) > 1 or not found:
                found.append([name])
            else:  # a normalisation belongs to what it normalises
                found[-1].append(name)
        return found


def build(
    shape: tuple[int, int, int],
    classes: int,
    *,
    conv_dropout: float,
    dense_dropout: float,
    library: str = "timm",
    name: str = "resnet50",
    units: int | None = None,
    auxiliary: bool = False,
) -> nn.Module:
    """Return trunk → pooled features → [conv dropout] → [dense of `units`, ReLU] → [dense dropout] → logits.

    `auxiliary`: with the auxiliary branches of torchvision's `inception_v3` or `googlenet`.
    """
    trunk = build_trunk(library, name, shape, classes, auxiliary=auxiliary)
    return Backbone(trunk, _head(feature_count(trunk), units, classes, conv_dropout, dense_dropout))


def build_trunk(
    library: str, name: str, shape: tuple[int, int, int], classes: int, *, auxiliary: bool = False
) -> nn.Module:
    """Return the library's network without its last layer; `classes` is for auxiliary branches."""
    trunk = original(library, name, shape, classes, auxiliary=auxiliary)
    if library == "timm":
        trunk.reset_classifier(0)  # type: ignore[operator]
    else:
        last = _last_layer(trunk, name)
        features = trunk.get_submodule(last).in_features
        trunk.set_submodule(last, nn.Identity())
        trunk.feature_count = features
    # Where dropout sits is said by the recipe alone.
    for module in trunk.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return trunk


def original(
    library: str,
    name: str,
    shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    *,
    auxiliary: bool = False,
) -> nn.Module:
    """Return the library's own untrained network; without `shape` and `classes` as it was published.

    Raises:
        UserError: there is no such library or network.
    """
    check_name(library, name)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if auxiliary and (library != "torchvision" or name not in AUXILIARY_SIDE):
        raise ValueError(f"only torchvision's {' and '.join(AUXILIARY_SIDE)} have auxiliary logits")
    if library == "timm":
        import timm

        if shape is not None:
            options["in_chans"] = shape[0]
            if (timm.get_pretrained_cfg(name, allow_unregistered=True) or _Any).fixed_input_size:
                options["img_size"] = shape[1:]
        return timm.create_model(name, pretrained=False, **options)
    from torchvision import models

    if shape is not None and shape[0] != 3:
        raise ValueError("torchvision's networks take three channels: set data.image.channels: 3")
    if name in AUXILIARY_SIDE:
        options |= {"aux_logits": auxiliary, "init_weights": True}
        side = AUXILIARY_SIDE[name]
        if auxiliary and shape is not None and min(shape[1:]) < side:
            raise ValueError(
                f"auxiliary logits need {side}×{side} pixels: set data.image.size, "
                "or model.arguments.auxiliary: false"
            )
    return models.get_model(name, weights=None, **options)


def check_name(library: str, name: str) -> None:
    """Raise one clear error where a library has no such network."""
    if library not in LIBRARIES:
        raise UserError(f"model.arguments.library: got {library!r}, must be one of {', '.join(LIBRARIES)}")
    if library == "timm":
        import timm

        known, asked = timm.list_models(), name.partition(".")[0]
    else:
        from torchvision import models

        known, asked = models.list_models(module=models), name
    if asked not in known:
        close = difflib.get_close_matches(asked, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"model.arguments.name: {library} has no network {name!r}{hint}")


def feature_count(trunk: nn.Module) -> int:
    """Return how many features a trunk gives for a picture."""
    for name in ("feature_count", "head_hidden_size", "num_features"):
        count = getattr(trunk, name, None)
        if isinstance(count, int):
            return count
    raise ValueError(f"{type(trunk).__name__} does not say how many features it gives")


class _Any:
    fixed_input_size = False


def _head(
    features: int, units: int | None, classes: int, conv_dropout: float, dense_dropout: float
) -> nn.Sequential:
    dense: Sequence[nn.Module] = () if units is None else (nn.Linear(features, units), nn.ReLU(inplace=True))
    return nn.Sequential(
        drop(conv_dropout), *dense, drop(dense_dropout), nn.Linear(features if units is None else units, classes)
    )


def _last_layer(network: nn.Module, name: str) -> str:
    """Return the name of the layer that gives the logits."""
    last = [place for place, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]
    if not last or not last[0].startswith(("fc", "classifier", "head")):
        raise ValueError(f"torchvision's {name} does not end in a dense layer: take another network")
    return last[0]


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if name in CONTAINERS:
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
