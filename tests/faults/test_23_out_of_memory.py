"""Row 23: memory runs out; a smaller batch is tried where that is configured, else a clear error."""

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from training_recipes import SHORT, same

from cnn_tuning.config import patch
from cnn_tuning.training.fit import OutOfMemory, fit


class Full(Callback):
    """Run out of memory, as torch says it, in every step with more than so many images."""

    def __init__(self, most, error):
        self.most, self.error, self.raised = most, error, []

    def on_train_batch_start(self, trainer, module, batch, *_):
        if len(batch[1]) > self.most:
            self.raised.append(len(batch[1]))
            raise self.error


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError("no memory")], ids=["gpu", "cpu", "python"])
def test_a_clear_error(packed, recipe, tmp_path, error):
    full = Full(32, error)
    with pytest.raises(
        OutOfMemory, match=r"batch size 64 .*lower trainer.batch_size, or set .*halve_batch"
    ) as caught:
        fit(patch(recipe, SHORT), packed, state_folder=tmp_path, callbacks=[full])
    assert full.raised == [64]
    assert "\n" not in str(caught.value)


def test_half_the_batch_as_often_as_needed(packed, recipe, tmp_path, capsys):
    full = Full(16, GPU)
    wanted = patch(recipe, {**SHORT, "trainer.on_out_of_memory": "halve_batch"})
    fitted = fit(wanted, packed, state_folder=tmp_path / "a", callbacks=[full])
    assert full.raised == [64, 32]
    assert fitted.recipe.trainer.batch_size == 16
    told = capsys.readouterr().err
    assert "out of memory at batch size 64, starting anew with 32" in told
    # The same as if it had been asked for in the first place.
    asked = fit(patch(wanted, {"trainer.batch_size": 16}), packed, state_folder=tmp_path / "b")
    assert same(asked.network, fitted.network)


def test_another_error_is_not_taken_for_it(packed, recipe, tmp_path):
    with pytest.raises(RuntimeError, match="something else"):
        fit(
            patch(recipe, SHORT),
            packed,
            state_folder=tmp_path,
            callbacks=[Full(0, RuntimeError("something else"))],
        )
