"""Fine-tuning: which stages of a backbone learn in an epoch and how fast, by the recipe and the epoch alone."""

from __future__ import annotations

from cnn_tuning.config import FinetuneConfig, Recipe
from cnn_tuning.models.backbone import AUXILIARY, Backbone
from cnn_tuning.models.network import Network
from cnn_tuning.training.optimisation import Share


def finetuning_of(network: Network, recipe: Recipe) -> Finetuning | None:
    """Freeze a network as the recipe's first epoch wants it; None where all of it is trained at one rate."""
    finetune = recipe.trainer.finetune
    return Finetuning(network.body, finetune) if finetune and isinstance(network.body, Backbone) else None


class Finetuning:
    """Freezes and frees the stages of one backbone; what is frozen has no gradient and keeps its statistics."""

    def __init__(self, backbone: Backbone, config: FinetuneConfig) -> None:
        self.backbone, self.config = backbone, config
        self.stages = backbone.stages()
        self._free: int | None = None
        self.begin_epoch(0)

    def free_stages(self, epoch: int) -> int:
        """Return how many stages, counted from the head, learn in an epoch (the first is 0)."""
        count = len(self.stages)
        if self.config.trainable == "gradual":
            return min(count, epoch // self.config.unfreeze_every)
        return count if self.config.trainable == "all" else 0

    def begin_epoch(self, epoch: int) -> bool:
        """Freeze and free for an epoch and tell whether anything changed; may be called before every step."""
        free = self.free_stages(epoch)
        if free == self._free:
            return False
        self._free = free
        trunk = self.backbone.trunk
        trunk.train(free > 0)
        frozen = self.stages[: len(self.stages) - free]
        for name in (name for stage in frozen for name in stage):
            trunk.get_submodule(name).eval()
        places = self._stage_of_parameters()
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_(free > 0 and places[name] >= len(frozen))
        return True

    def shares(self) -> list[Share]:
        """Return what is ever trained, by its share of the learning rate, the head first."""
        named = dict(self.backbone.trunk.named_parameters())
        shares: list[Share] = [(1.0, list(self.backbone.head.parameters()))]
        if self.config.trainable == "head":
            return shares
        places = self._stage_of_parameters()
        count = len(self.stages)
        # Auxiliary branches are as new as the head.
        shares[0][1].extend(named[name] for name, place in places.items() if place == count)
        for place in reversed(range(count)):
            own = [named[name] for name, at in places.items() if at == place]
            shares.append((self.config.layer_decay ** (count - place), own))
        return shares

    def _stage_of_parameters(self) -> dict[str, int]:
        """Return the number of each parameter's stage; of auxiliary branches the one after the last.

        What belongs to no module of a stage, such as a class token, is of the first.
        """
        stage_of = {name: number for number, stage in enumerate(self.stages) for name in stage}
        places = {}
        for name, _ in self.backbone.trunk.named_parameters():
            if name.startswith(AUXILIARY):
                places[name] = len(self.stages)
                continue
            places[name] = next((n for part, n in stage_of.items() if name.startswith(f"{part}.")), 0)
        return places
