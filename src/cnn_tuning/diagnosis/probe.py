"""Statistics of a network's weights, gradients and activations at single training steps, taken on its device.

A step is looked at by three calls: `begin` before it (hooks), `gradients` between backward pass and update,
`end` after the update. `collect` moves what has gathered to the CPU, and `tensors` returns it. Nothing changes
the network or draws random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cnn_tuning.diagnosis.recording import Floats, Tensors

# At most so many weights of a layer are looked at, spread evenly, and activations of so many images.
WEIGHTS = 2**16
IMAGES = 64
# A unit is judged by so many samples together.
WINDOW = 8
ALIVE_SHARE = 0.01
NEAR_BOUND = 0.01

# Without a gradient below 0: only their units can die.
RECTIFIERS = (nn.ReLU, nn.ReLU6)
SOFT_RECTIFIERS = (nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish)
# Of ReLU6 the upper bound only: 0 is what it mostly gives.
BOUNDS: dict[type[nn.Module], tuple[float, float]] = {
    nn.ReLU6: (-math.inf, 6.0),
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Hardtanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
}
ACTIVATIONS = (*RECTIFIERS, *SOFT_RECTIFIERS, *BOUNDS, nn.Hardswish, nn.Softplus)
PER_LAYER = (
    "weight_rms",
    "weight_zero",
    "gradient_rms",
    "gradient_mean",
    "gradient_zero",
    "output_variance",
    "update_ratio",
)
PER_ACTIVATION = ("active", "dead", "saturated")


def layer_name(name: str) -> str:
    """Return a module's name in `named_modules` as people know it: within the network's body."""
    return name.removeprefix("body.")


@dataclass
class _Sample:
    """What the device gives of one step, by layer or activation.

    `raw`: for all layers each the norms L2 and L0 of the weight, L2, L1 and L0 of the gradient, L2 of the update,
    L2 and mean of the output. `units`: active share of each unit.
    """

    step: int
    scale: float = 1.0
    images: int = 0
    raw: list[Tensor] = field(default_factory=list)
    outputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    output_sizes: dict[int, int] = field(default_factory=dict)
    saturated: dict[int, Tensor] = field(default_factory=dict)
    units: dict[int, Tensor] = field(default_factory=dict)


class Probe:
    """Looks at one network; without `hooked` not at activations, which a compiled network does not show.

    Layers are modules with a weight of two or more dimensions, so that normalisation is none, in the order in
    which the network defines them.
    """

    def __init__(self, network: nn.Module, *, hooked: bool) -> None:
        modules: list[tuple[str, nn.Module]] = [(layer_name(n), module) for n, module in network.named_modules()]
        weights = [(name, module, _weight_of(module)) for name, module in modules]
        self.layers = [(name, module, weight) for name, module, weight in weights if weight is not None]
        self.activations = [(name, module) for name, module in modules if isinstance(module, ACTIVATIONS)]
        self.hooked = hooked
        self.changed = np.full(len(self.layers), np.nan, np.float32)
        self._first = [_spread(weight).clone() for weight in self._weights()]
        self._steps: list[int] = []
        self._layer_rows: list[Floats] = []
        self._activation_rows: list[Floats] = []
        self._recent: list[tuple[int, dict[int, Floats]]] = []
        self._samples: list[_Sample] = []
        self._now: _Sample | None = None
        self._before: list[Tensor] = []
        self._handles: list[RemovableHandle] = []

    def begin(self, step: int) -> None:
        """Look at what the next forward pass puts out."""
        self.abandon()
        self._now = sample = _Sample(step)
        if not self.hooked:
            return
        for index, (_, layer, _) in enumerate(self.layers):
            self._handles.append(layer.register_forward_hook(_output_hook(sample, index)))
        for index, (_, activation) in enumerate(self.activations):
            self._handles.append(activation.register_forward_hook(_activation_hook(sample, index)))

    @torch.no_grad()
    def gradients(self, scale: float = 1.0) -> None:
        """Measure weights and their gradients, which are `scale` times too large, and keep the weights."""
        if self._now is None or not self.layers:
            return
        self._unhook()
        weights = [_spread(weight) for weight in self._weights()]
        self._before = [weight.clone() for weight in weights]
        gradients = [None if w.grad is None else _spread(w.grad) for w in self._weights()]
        self._now.scale = scale
        self._now.raw = [
            *torch._foreach_norm(weights),
            *torch._foreach_norm(weights, 0),
            *(norm for order in (2, 1, 0) for norm in _norms(gradients, order, weights[0])),
        ]

    @torch.no_grad()
    def end(self) -> None:
        """Measure the update, and keep the sample."""
        sample, self._now = self._now, None
        if sample is None or not self.layers:
            return
        weights = [_spread(weight) for weight in self._weights()]
        torch._foreach_sub_(self._before, weights)
        missing = (_nan(weights[0]),) * 2
        outputs = [sample.outputs.get(index, missing) for index in range(len(weights))]
        sample.raw += [
            *torch._foreach_norm(self._before),
            *(norm for norm, _ in outputs),
            *(mean for _, mean in outputs),
        ]
        sample.raw = [torch.stack(sample.raw)]
        self._before = []
        self._samples.append(sample)

    def abandon(self) -> None:
        """Forget the step that was begun."""
        self._unhook()
        self._now, self._before = None, []

    def collect(self) -> None:
        """Move what has gathered to the CPU: two transfers, however many samples."""
        samples, self._samples = self._samples, []
        if not samples:
            return
        raw = torch.stack([sample.raw[0] for sample in samples]).double().cpu().numpy()
        flat = [tensor for sample in samples for tensor in (*sample.units.values(), *sample.saturated.values())]
        values = iter(
            torch.cat([t.reshape(-1) for t in flat]).cpu().split([t.numel() for t in flat]) if flat else ()
        )
        for sample, row in zip(samples, raw, strict=True):
            self._steps.append(sample.step)
            self._layer_rows.append(self._layer_row(sample, row.reshape(-1, len(self.layers))))
            units = {index: next(values).numpy() for index in sample.units}
            saturated = {index: float(next(values)) for index in sample.saturated}
            self._activation_rows.append(self._activation_row(sample, units, saturated))

    @torch.no_grad()
    def compare(self) -> None:
        """Compare the weights with those at the start."""
        if not self._first:
            return
        now = [_spread(weight) for weight in self._weights()]
        self._first = [tensor.to(weight.device) for tensor, weight in zip(self._first, now, strict=True)]
        norms = [*torch._foreach_norm(torch._foreach_sub(now, self._first)), *torch._foreach_norm(self._first)]
        moved, first = torch.stack(norms).cpu().numpy().reshape(2, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.changed = moved / first

    def tensors(self) -> Tensors | None:
        """Return what was collected; None before the first sample."""
        if not self._steps:
            return None
        layers = np.stack(self._layer_rows)
        activations = np.stack(self._activation_rows)
        return Tensors(
            step=np.array(self._steps, np.int64),
            layers=tuple(name for name, *_ in self.layers),
            **{name: layers[:, index] for index, name in enumerate(PER_LAYER)},
            trainable=np.array([weight.requires_grad for weight in self._weights()], np.int64),
            changed=self.changed,
            activations=tuple(name for name, _ in self.activations),
            kinds=tuple(type(module).__name__ for _, module in self.activations),
            **{name: activations[:, index] for index, name in enumerate(PER_ACTIVATION)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs to go on, in plain values and tensors."""
        self.collect()
        return {
            "steps": self._steps,
            "layers": [torch.from_numpy(row) for row in self._layer_rows],
            "activations": [torch.from_numpy(row) for row in self._activation_rows],
            "recent": [
                (images, {index: torch.from_numpy(shares) for index, shares in units.items()})
                for images, units in self._recent
            ],
            "changed": torch.from_numpy(self.changed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._steps = list(state["steps"])
        self._layer_rows = [row.numpy() for row in state["layers"]]
        self._activation_rows = [row.numpy() for row in state["activations"]]
        self._recent = [
            (images, {index: shares.numpy() for index, shares in units.items()})
            for images, units in state["recent"]
        ]
        self.changed = state["changed"].numpy()

    def _weights(self) -> list[Tensor]:
        return [weight for *_, weight in self.layers]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _layer_row(self, sample: _Sample, raw: NDArray[np.float64]) -> Floats:
        """Return `PER_LAYER` × L for `RAW` × L."""
        weight, filled, gradient, absolute, gradient_filled, update, output, mean = raw
        sizes = np.array([len(tensor) for tensor in self._first])
        outputs = np.array([sample.output_sizes.get(index, 1) for index in range(len(sizes))])
        with np.errstate(all="ignore"):
            rows = {
                "weight_rms": weight / np.sqrt(sizes),
                "weight_zero": 1 - filled / sizes,
                "gradient_rms": gradient / np.sqrt(sizes) / sample.scale,
                "gradient_mean": absolute / sizes / sample.scale,
                "gradient_zero": 1 - gradient_filled / sizes,
                "output_variance": np.maximum(output**2 / outputs - mean**2, 0),
                "update_ratio": update / weight,
            }
            return np.stack([rows[name] for name in PER_LAYER]).astype(np.float32)

    def _activation_row(self, sample: _Sample, units: dict[int, Floats], saturated: dict[int, float]) -> Floats:
        """Return `PER_ACTIVATION` × A, with the units of the last samples for the dead ones."""
        self._recent = [*self._recent[1 - WINDOW :], (sample.images, units)]
        row = np.full((len(PER_ACTIVATION), len(self.activations)), np.nan, np.float32)
        for index, (_, module) in enumerate(self.activations):
            if index in units:
                row[0, index] = units[index].mean()
                if isinstance(module, RECTIFIERS):
                    row[1, index] = np.mean(self._share_of_time(index) < ALIVE_SHARE)
            row[2, index] = saturated.get(index, np.nan)
        return row

    def _share_of_time(self, index: int) -> Floats:
        """Return how often each unit of an activation was active in the last samples."""
        seen = [(images, units[index]) for images, units in self._recent if index in units]
        return np.average([shares for _, shares in seen], axis=0, weights=[images for images, _ in seen])


def _weight_of(module: nn.Module) -> nn.Parameter | None:
    own = module.parameters(recurse=False)
    return next((parameter for parameter in own if parameter.ndim > 1), None)


def _spread(weight: Tensor) -> Tensor:
    """Return a flat view of at most `WEIGHTS` elements, evenly spread over all rows and columns."""
    weight = weight.detach()
    size = weight.numel()
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if not dense:
        return weight.reshape(-1)
    stride = -(-size // WEIGHTS)
    while math.gcd(stride, size) > 1 < stride:  # or it would see the same columns in every row
        stride += 1
    return weight.as_strided((-(-size // stride),), (stride,), weight.storage_offset())


def _nan(like: Tensor) -> Tensor:
    return like.new_full((), math.nan)


def _norms(tensors: Sequence[Tensor | None], order: int, like: Tensor) -> list[Tensor]:
    """Return the norm of each tensor, NaN for none."""
    present = [tensor for tensor in tensors if tensor is not None]
    norms = iter(torch._foreach_norm(present, order) if present else ())
    return [_nan(like) if tensor is None else next(norms) for tensor in tensors]


def _output_hook(sample: _Sample, index: int) -> Callable[..., None]:
    @torch.no_grad()
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or index in sample.outputs:
            return
        seen = output.detach()[:IMAGES]
        # Two plain reductions: torch.var takes several times as long on a CPU.
        norm = torch.linalg.vector_norm(seen, dtype=torch.float32)
        sample.outputs[index] = (norm, seen.mean(dtype=torch.float32))
        sample.output_sizes[index] = seen.numel()

    return look


def _activation_hook(sample: _Sample, index: int) -> Callable[..., None]:
    @torch.no_grad()
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or index in sample.units or index in sample.saturated:
            return
        seen = output.detach()[:IMAGES]
        sample.images = len(seen)
        if isinstance(module, RECTIFIERS + SOFT_RECTIFIERS):
            # Channels of a convolution, features of all else. The sign is a quick comparison with 0.
            unit = 1 if seen.ndim in (2, 4, 5) else seen.ndim - 1
            others = [dimension for dimension in range(seen.ndim) if dimension != unit]
            signs = seen.sign() if isinstance(module, RECTIFIERS) else seen.sign().clamp_(min=0)
            sample.units[index] = signs.mean(others, dtype=torch.float32)
        bounds = _bounds_of(module)
        if bounds is not None:
            low, high = bounds
            margin = NEAR_BOUND * (high - max(low, 0.0 if math.isinf(low) else low))
            near = (seen >= high - margin) | (seen <= low + margin)
            sample.saturated[index] = near.mean(dtype=torch.float32)

    return look


def _bounds_of(module: nn.Module) -> tuple[float, float] | None:
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return module.min_val, module.max_val
    return next((bounds for kind, bounds in BOUNDS.items() if isinstance(module, kind)), None)
