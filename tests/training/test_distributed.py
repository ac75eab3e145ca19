"""Several processes that train together: they equal one, go on where they stopped, say which one failed."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from children import below
from hypothesis import assume, given
from hypothesis import strategies as st
from project import ROOT, free_port
from pytorch_lightning.callbacks import Callback
from training_recipes import SHORT, SignalAt, recipe_with, same

from cnn_tuning.config import patch
from cnn_tuning.data.batches import Batches, Share
from cnn_tuning.data.packed import PackedSplit
from cnn_tuning.data.shards import write_shards
from cnn_tuning.errors import CutOff, UserError
from cnn_tuning.training.fit import fit
from cnn_tuning.training.resume import Interrupted

CPU = torch.device("cpu")
# No normalisation and no dropout: what two processes learn is then what one learns, but for the order of sums.
PLAIN = {
    "model.architecture": "lab_cnn",
    "model.arguments": {"filters": [8, 16], "units": 32},
    "optimizer.learning_rate": 3e-3,
    "augment.shift": 0.1,
    "augment.rotate_degrees": 5.0,
    "trainer.batch_size": 63,  # odd: shares of 32 and 31; the last batch of an epoch has 33 images
    "trainer.threads": 1,
}


class StopAfter(Callback):
    """Ends the training after an epoch, as a rule of the diagnosis does: in the first process only."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.current_epoch + 1 == self.epoch


class At(Callback):
    """Does something to the followers after a number of steps."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            for process in followers():
                self.act(process)


class FullAt(Callback):
    """Runs out of memory after a number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise MemoryError("no memory")


def followers() -> list[psutil.Process]:
    return [child for child, command in below() if any("training.follower" in part for part in command)]


def measured_here(fitted, data) -> float:
    split = data.split("val")
    with torch.no_grad():
        logits = fitted.network(torch.from_numpy(np.array(split.images)))
    return float(F.cross_entropy(logits, torch.from_numpy(split.labels)))


@functools.cache
def plain():
    return recipe_with(["trainer.workers=0", "augment=none"])


@given(
    count=st.integers(2, 200),
    size=st.integers(2, 64),
    world=st.integers(1, 5),
    epoch=st.integers(0, 9),
    train=st.booleans(),
)
def test_the_shares_of_all_processes_make_up_every_batch(count, size, world, epoch, train):
    assume(min(count, size) >= 2 * world)
    # Each image holds its own number: augmentation may move it, but must move it alike wherever it is drawn.
    images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(4, 2).repeat(4, 3)
    split = PackedSplit(images, np.arange(count))
    changed = patch(plain(), {"trainer.batch_size": size, "trainer.eval_batch_size": size, "augment.shift": 0.3})

    def batches(rank, of):
        given = Batches(split, changed, CPU, resident=True, train=train, share=Share(rank, of))
        given.begin_at(epoch, 0)
        return given, list(given)

    shares = [batches(rank, world) for rank in range(world)]
    if not train:
        seen = torch.cat([labels for _, own in shares for _, labels in own])
        assert sorted(seen.tolist()) == list(range(count))
        return
    whole = torch.cat([labels for _, labels in batches(0, 1)[1]])
    joined = []
    for position, parts in enumerate(zip(*(own for _, own in shares), strict=True)):
        sizes = [len(labels) for _, labels in parts]
        assert sum(sizes) == shares[0][0].size_of(position)
        assert min(sizes) >= 2
        assert max(sizes) - min(sizes) <= 1
        batch, pixels = (
            torch.empty(sum(sizes), dtype=torch.int64),
            torch.empty(sum(sizes), 1, 4, 4, dtype=torch.uint8),
        )
        for rank, (own, labels) in enumerate(parts):
            batch[rank::world], pixels[rank::world] = labels, own
        joined.append((pixels, batch))
    assert torch.equal(torch.cat([labels for _, labels in joined]), whole)
    for (pixels, labels), (own, expected) in zip(joined[:-1], batches(0, 1)[1], strict=False):
        assert torch.equal(labels, expected)
        assert torch.equal(pixels, own)


# A schedule that asks what was measured.
PLATEAU = {"name": "plateau", "factor": 0.5, "patience": 0}


def test_two_processes_learn_what_one_learns_and_stop_together(packed, recipe, tmp_path):
    short = patch(recipe, PLAIN | {"trainer.max_epochs": 3, "trainer.ema_decay": 0.9, "schedule": PLATEAU})
    one, two = (
        fit(
            patch(short, {"trainer.devices": devices}),
            packed,
            state_folder=tmp_path / str(devices),
            callbacks=[StopAfter(2)],
        )
        for devices in (1, 2)
    )
    assert [row["step"] for row in two.history] == [row["step"] for row in one.history]
    assert len(two.history) == 2
    for ours, expected in zip(two.history, one.history, strict=True):
        for name in ("train/loss", "val/loss"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-5)
        for name in ("train/accuracy", "val/accuracy"):
            assert ours[name] == expected[name]
    for ours, expected in zip(two.network.parameters(), one.network.parameters(), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-5)
    assert not followers()
    assert not torch.distributed.is_initialized()


def test_too_small_a_batch_for_the_processes_is_said(packed, recipe, tmp_path):
    with pytest.raises(UserError, match="batches of 7 images give some of 4 processes fewer than two"):
        fit(patch(recipe, {"trainer.devices": 4, "trainer.batch_size": 7}), packed, state_folder=tmp_path)


def test_nobody_to_join_is_said(packed, start):
    done = joining(start, packed.path, free_port(), wait_s=0)
    assert done.wait(60) == 1
    assert re.fullmatch(r"error: 127.0.0.1:\d+ does not answer .*: start the training there\n", done.stderr.read())


@pytest.fixture
def start():
    """Return a function that starts a process, which does not outlive the test."""
    started = []

    def begin(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **environment}, **output))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def joining(start, data: Path, port: int, wait_s: float = 200) -> subprocess.Popen[str]:
    command = Path(sys.executable).parent / "cnn-tuning"
    place = ["--master", f"127.0.0.1:{port}", "--node-rank", "1", "--wait", str(wait_s)]
    return start(command, "join", "--data", str(data), *place)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["memory map", "shards"])
def test_two_processes_go_on_as_if_never_stopped(packed, recipe, tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the cache of shards is below the working folder
    both = patch(recipe, SHORT | {"trainer.devices": 2, "trainer.threads": 1, "trainer.ema_decay": 0.9})
    if source == "shards":
        write_shards(packed, str(tmp_path / "shards"), shard_mb=0.02)
        both = patch(both, {"trainer.stream": str(tmp_path / "shards")})
    whole = fit(both, packed, state_folder=tmp_path / "whole")
    # All measure with the weights and running statistics that are kept.
    assert whole.best["val/loss"] == pytest.approx(measured_here(whole, packed), rel=1e-5)
    with pytest.raises(Interrupted):
        fit(both, packed, state_folder=tmp_path / "cut", callbacks=[SignalAt(8)])
    assert not followers()
    again = fit(both, packed, state_folder=tmp_path / "cut")
    assert again.resumed_from == 8
    assert again.history == whole.history
    assert same(again.network, whole.network)


@pytest.mark.slow
def test_a_killed_process_is_named_and_no_other_stays(packed, recipe, tmp_path):
    three = patch(recipe, PLAIN | {"trainer.devices": 3, "trainer.max_epochs": 50})
    kill = At(5, lambda process: process.kill() if process == followers()[0] else None)
    with pytest.raises(CutOff, match=r"^rank [12] was ended by SIGKILL .*goes on from the last checkpoint$"):
        fit(three, packed, state_folder=tmp_path, callbacks=[kill])
    assert not followers()


@pytest.mark.slow
def test_a_signal_that_reaches_the_others_too_is_the_first_ones_affair(packed, recipe, tmp_path):
    both = patch(recipe, PLAIN | {"trainer.devices": 2, "trainer.max_epochs": 2})
    signals = [At(3, lambda p: p.send_signal(signal.SIGTERM)), At(4, lambda p: p.send_signal(signal.SIGINT))]
    assert len(fit(both, packed, state_folder=tmp_path, callbacks=signals).history) == 2


@pytest.mark.slow
def test_all_stop_early_and_read_their_shares_through_the_memory_map(packed, recipe, tmp_path):
    mapped = patch(recipe, PLAIN | {"trainer.max_epochs": 4, "trainer.data_on_device": "no", "trainer.workers": 1})
    patient = patch(mapped, {"trainer.early_stopping": {"patience": 1, "min_delta": 0.5}})
    one, two = (
        fit(patch(patient, {"trainer.devices": devices}), packed, state_folder=tmp_path / str(devices))
        for devices in (1, 2)
    )
    assert len(two.history) == 2
    assert two.history[-1]["val/loss"] == pytest.approx(one.history[-1]["val/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_loss_that_breaks_is_told_as_of_one_process(packed, recipe, tmp_path):
    wild = patch(recipe, PLAIN | {"trainer.devices": 2, "optimizer.learning_rate": 1e30})
    with pytest.raises(UserError, match="the loss is no longer finite at step"):
        fit(wild, packed, state_folder=tmp_path)


@pytest.mark.slow
def test_stages_that_are_freed_later_learn_alike_in_all(tmp_path, monkeypatch):
    import backbones

    monkeypatch.chdir(tmp_path)
    data = backbones.pictures(tmp_path / "colours", train=48, val=24)
    gradual = {"trainer.finetune": {"trainable": "gradual"}, "trainer.max_epochs": 3, "trainer.devices": 2}
    fitted = fit(patch(backbones.pretrained_recipe(tmp_path), gradual), data, state_folder=tmp_path / "state")
    assert fitted.best["val/loss"] == pytest.approx(measured_here(fitted, data), rel=1e-4)


@pytest.fixture
def leading(packed, tmp_path, start):
    """Return a function that starts the training of two machines, and gives its process and port."""

    def lead(**environment: str) -> tuple[subprocess.Popen[str], int]:
        port = free_port()
        script = tmp_path / "lead.py"
        script.write_text(LEAD)
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        path = {"PYTHONPATH": f"{ROOT}/tests:{ROOT}/tests/training"}
        command = (sys.executable, script, packed.path, tmp_path / "state")
        return start(*command, **here, **path, **environment), port

    return lead


LEAD = """
import json, os, sys
from pathlib import Path
from cnn_tuning.config import patch
from cnn_tuning.data.packed import PackedData
from cnn_tuning.errors import UserError
from cnn_tuning.training.fit import fit
from test_distributed import PLAIN, FullAt
from training_recipes import recipe_with

changes = json.loads(os.environ.get("CHANGES", "{}"))
recipe = patch(recipe_with([]), PLAIN | {"trainer.num_nodes": 2} | changes)
data, full = PackedData.open(Path(sys.argv[1])), [FullAt(3)] if "FULL" in os.environ else []
try:
    fitted = fit(recipe, data, state_folder=Path(sys.argv[2]), callbacks=full)
except UserError as error:
    sys.exit(f"error: {error}")
print(json.dumps(fitted.history))
"""


@pytest.mark.slow
def test_another_machine_joins(packed, tmp_path, leading, start):
    import json

    process, port = leading()
    joined = joining(start, packed.path, port)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"`cnn-tuning join --master 127.0.0.1:{port} --node-rank K" in err
    assert joined.wait(60) == 0, joined.stderr.read()
    one = fit(patch(recipe_with([]), PLAIN), packed, state_folder=tmp_path / "one")
    for ours, expected in zip(json.loads(out), one.history, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_another_machine_with_other_data_is_told_on_both(packed, tmp_path, leading, start):
    other = tmp_path / "other"
    (other / "train").mkdir(parents=True)
    text = (packed.path / "meta.json").read_text()
    (other / "meta.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    process, port = leading()
    joined = joining(start, other, port)
    said = joined.communicate(timeout=300)[1], process.communicate(timeout=60)[1]
    assert (joined.returncode, process.returncode) == (1, 1)
    for text in said:
        assert "data/prepared of rank 1 differs from that of rank 0" in text.splitlines()[-1]


@pytest.mark.slow
def test_another_machine_with_other_shards_is_told_on_both(packed, tmp_path, leading, start, monkeypatch):
    for folder, size in (("here", 0.02), ("there", 0.01)):
        write_shards(packed, str(tmp_path / folder / "shards"), size)
    monkeypatch.chdir(tmp_path / "here")
    process, port = leading(CHANGES='{"trainer.stream": "shards"}')
    monkeypatch.chdir(tmp_path / "there")
    joined = joining(start, packed.path, port)
    said = joined.communicate(timeout=300)[1], process.communicate(timeout=60)[1]
    assert (joined.returncode, process.returncode) == (1, 1)
    for text in said:
        assert "the index of trainer.stream of rank 1 differs from that of rank 0" in text.splitlines()[-1]


def test_what_one_process_trains_is_refused_under_another_launcher(packed, recipe, tmp_path, monkeypatch):
    import backbones

    head = backbones.recipe_of(trainer__finetune={"trainable": "head"}, trainer__devices=2)
    colours = backbones.pictures(tmp_path / "colours", train=48, val=24)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match=r"started 2 processes, but .* is 1: make them"):
            fit(recipe, packed, state_folder=tmp_path / "state")
        with pytest.raises(UserError, match="is trained by one process: start it without a launcher"):
            fit(head, colours, state_folder=tmp_path / "state")


FOLLOW = (
    "import sys; from pathlib import Path; import torch.distributed as dist; dist.init_process_group('gloo');"
    "from cnn_tuning.training.follower import follow; from cnn_tuning.training.ranks import outer_ranks;"
    "from cnn_tuning.data.packed import PackedData; follow(outer_ranks(), PackedData.open(Path(sys.argv[1])));"
    "dist.destroy_process_group()"
)


def following(start, data: Path, port: int) -> subprocess.Popen[str]:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return start(sys.executable, "-c", FOLLOW, data, **place)


@pytest.mark.slow
def test_too_little_memory_under_another_launcher_ends_all(packed, leading, start):
    halve = '{"trainer.on_out_of_memory": "halve_batch"}'
    process, port = leading(RANK="0", WORLD_SIZE="2", CHANGES=halve, FULL="1")
    other = following(start, packed.path, port)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("error: out of memory at batch size 63 (no memory): lower"), said
    assert other.wait(60) != 0


@pytest.mark.slow
def test_processes_of_another_launcher_are_taken(packed, tmp_path, leading, start):
    import json

    process, port = leading(RANK="0", WORLD_SIZE="2")
    other = following(start, packed.path, port)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert other.wait(60) == 0, other.stderr.read()
    assert len(json.loads(out)) == 2


@pytest.mark.slow
def test_the_stage_records_one_run(packed, tmp_path, store_db, rows):
    command = [
        *(sys.executable, "-P", "-m", "cnn_tuning.stages.train", "experiment=digits", "trainer.max_epochs=2"),
        *("trainer.devices=2", f"tracking.uri=sqlite:///{store_db}", f"tracking.spool={tmp_path}/spool"),
        *("--inputs", str(tmp_path / "in"), "--outputs", str(tmp_path / "out")),
    ]
    (tmp_path / "in/data").mkdir(parents=True)
    (tmp_path / "in/data/prepared").symlink_to(packed.path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rows(store_db, "select count(*) from runs") == [(1,)]
    curve = rows(store_db, "select step, count(*) from metrics where key='val/accuracy' group by step")
    assert [count for _, count in curve] == [1, 1]
    assert (tmp_path / "out/models/baseline/best.json").exists()
