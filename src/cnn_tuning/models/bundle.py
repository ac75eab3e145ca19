"""A trained network on disk: `weights.safetensors` and `model.json`, the same bytes for the same weights.

No pickle: loading a bundle runs none of its content. `model.json` says which network to build, what its
answers mean, how a picture becomes its input, and the SHA-256 that the weights must have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cnn_tuning.config import ImageConfig, ModelConfig, validate
from cnn_tuning.errors import UserError
from cnn_tuning.models.network import Network, build_network

WEIGHTS = "weights.safetensors"
MODEL = "model.json"


@dataclass(frozen=True)
class Specification:
    """What a network is and means; `mean` and `std` per channel are of pixels in [0, 1]."""

    data_name: str
    model: ModelConfig
    classes: tuple[str, ...]
    image: ImageConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the input's (C, H, W)."""
        return (self.image.channels, *self.image.size)

    def build(self) -> Network:
        """Return the untrained network."""
        return build_network(self.model, self.shape, len(self.classes), self.mean, self.std)


def save(directory: Path, network: nn.Module, specification: Specification) -> None:
    """Write the bundle; equal weights give equal bytes. A file is there whole or not at all."""
    from safetensors.torch import save as to_bytes

    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    weights = to_bytes(state)
    content = {"weights_sha256": hashlib.sha256(weights).hexdigest(), **dataclasses.asdict(specification)}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    written = {WEIGHTS: weights, MODEL: text.encode()}
    for name, data in written.items():
        (directory / f".{name}.partial").write_bytes(data)
    for name in written:
        (directory / f".{name}.partial").replace(directory / name)


def load(directory: Path, device: str = "cpu") -> tuple[Network, Specification]:
    """Return the network in evaluation mode and what it means.

    Raises:
        UserError: a file is missing, or the weights are not those that `model.json` names.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    directory = Path(directory)
    for name in (WEIGHTS, MODEL):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing: this is no model; run `dvc repro train`")
    try:
        content = json.loads((directory / MODEL).read_text())
        expected = content.pop("weights_sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{directory / MODEL} is damaged or of another program: restore it") from None
    weights = (directory / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != expected:
        raise UserError(f"{directory / WEIGHTS} is not the file that {MODEL} names (SHA-256 differs): restore it")
    specification = validate(Specification, content)
    network = specification.build()
    try:
        network.load_state_dict(from_bytes(weights))
    except SafetensorError as error:
        raise UserError(f"{directory / WEIGHTS} holds no safetensors ({error}): restore it") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{directory} was made by other code ({reason}): train it again, or use that version"
        ) from None
    return network.eval().to(device), specification
