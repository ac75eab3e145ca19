"""Random changes of a batch of training images on the device, each image with its own draw.

All numbers come from the generator that is passed in, on the CPU: one seed gives the same changes on
every device. Written out rather than taken from kornia, whose transforms draw from the global generator,
so that a resumed run could not repeat them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cnn_tuning.config import AugmentConfig

# Gives one number in [0, 1) an image, on the images' device.
Draw = Callable[[], Tensor]


def augment(
    images: Tensor,
    config: AugmentConfig,
    generator: torch.Generator,
    count: int | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """Return changed images for uint8 N×C×H×W: uint8 again, or floats in [0, 1] after an affine change.

    Where they are only the `rows` of a batch of `count`, they change as they would within the whole batch.
    """

    def draw() -> Tensor:
        return torch.rand(count or len(images), generator=generator)[rows].to(images.device)

    if config.flip:
        mirrored = draw() < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    if config.rotate_degrees or config.scale or config.shear_degrees:
        images = _affine(images, config, draw)
    elif config.shift:
        images = _shift(images, config.shift, draw)
    if config.cutout:
        images = _cutout(images, config.cutout, draw)
    return images


def _signed(draw: Draw) -> Tensor:
    return draw() * 2 - 1


def _shift(images: Tensor, share: float, draw: Draw) -> Tensor:
    """Move by whole pixels, up to `share` of each side; what comes in from outside is 0."""
    count, channels, height, width = images.shape
    down, right = round(share * height), round(share * width)
    padded = F.pad(images, (right, right, down, down))
    top = (draw() * (2 * down + 1)).long()
    left = (draw() * (2 * right + 1)).long()
    rows = top.view(-1, 1) + torch.arange(height, device=images.device)
    columns = left.view(-1, 1) + torch.arange(width, device=images.device)
    # One gather over flattened pixels: several times faster on a CPU than four-way indexing.
    wide = width + 2 * right
    pixels = (rows.view(count, height, 1) * wide + columns.view(count, 1, width)).view(count, 1, -1)
    flat = padded.reshape(count, channels, -1)
    return flat.gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


def _affine(images: Tensor, config: AugmentConfig, draw: Draw) -> Tensor:
    angle = _signed(draw) * math.radians(config.rotate_degrees)
    shear = _signed(draw) * math.radians(config.shear_degrees)
    size = 1 + _signed(draw) * config.scale
    right, down = _signed(draw) * 2 * config.shift, _signed(draw) * 2 * config.shift
    cos, sin, slant = torch.cos(angle) / size, torch.sin(angle) / size, torch.tan(shear)
    rows = [torch.stack([cos, sin + cos * slant, right], 1), torch.stack([-sin, cos - sin * slant, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float() / 255, grid, align_corners=False)


def _cutout(images: Tensor, share: float, draw: Draw) -> Tensor:
    """Set a square of `share` of the side, centred anywhere, to 0."""
    height, width = images.shape[2:]
    down = (draw() * height).view(-1, 1, 1)
    right = (draw() * width).view(-1, 1, 1)
    rows = torch.arange(height, device=images.device).view(1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, -1)
    hole = ((rows - down).abs() < share * height / 2) & ((columns - right).abs() < share * width / 2)
    return images.masked_fill(hole.unsqueeze(1), 0)
