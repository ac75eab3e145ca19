"""`cnn-tuning train-on-ray`: the stage `train` by several workers that Ray Train places, one device each.

Rank 0's process runs the stage as it is; the others' follow it. All are processes of their own below Ray's: the
stage takes the signals that Ray's processes keep for themselves. When one is lost, Ray Train starts all of them
again, and the stage goes on from its checkpoint, which has to lie where any host can be rank 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_tuning.config import RayConfig, compose, recipe_of
from cnn_tuning.errors import UserError
from cnn_tuning.processes import last_words

MODULE = "cnn_tuning.stages.ray_training"
STATE = Path(".state/ray")


def train(
    overrides: Sequence[str], ray_config: RayConfig, *, workers: int, retries: int, data: Path, out: Path
) -> None:
    """Train by so many workers, each with what `ray_config` says; results lie below `out` as the stage's do.

    Raises:
        UserError: in a line, what Ray or a worker said.
    """
    from cnn_tuning.search.ray_cluster import check_ray, connect, disconnect, share
    from cnn_tuning.training.together import check_takes_several

    given = (*overrides, "trainer.devices=1", f"trainer.num_nodes={workers}")
    config = compose(given)  # a mistake is told here, not by each worker
    check_ray(ray_config)
    if ray_config.num_gpus not in (0, 1):
        raise UserError(f"--gpus {ray_config.num_gpus:g}: a worker has one GPU or none")
    check_takes_several(recipe_of(config))
    connect(ray_config)
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        log = (out / STATE / "rank-0.log").resolve()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        job = {
            "log": str(log),
            "overrides": list(given),
            "project": str(Path.cwd()),
            "data": str(data),
            "out": str(out),
        }
        resources = {"CPU": ray_config.num_cpus, **({"GPU": ray_config.num_gpus} if ray_config.num_gpus else {})}
        print(f"train: {workers} workers on Ray, each {share(ray_config)}; it goes to {log}", file=sys.stderr)
        trainer = TorchTrainer(
            _loop,
            train_loop_config=job,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=bool(ray_config.num_gpus),
                resources_per_worker=resources,
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                storage_path=str(log.parent),
                failure_config=FailureConfig(max_failures=retries),
            ),
        )
        _fit(trainer)
        print(_outcome(log))
    finally:
        disconnect()


def _outcome(log: Path) -> str:
    """Return what rank 0 said of its model, after which it may have said that it waits for the tracking store."""
    told = [line for line in log.read_text(errors="replace").splitlines() if ": epoch " in line]
    return told[-1] if told else last_words(log)


def _fit(trainer: Any) -> None:
    from ray.train import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        told = [line for line in str(error).splitlines() if SAID in line]
        said = told[-1].partition(SAID)[2] if told else str(error).strip().splitlines()[-1]
        raise UserError(f"{said}; the same command goes on from the last checkpoint") from None


SAID = "cnn-tuning says: "


def _loop(job: dict[str, Any]) -> None:
    """Run in Ray's process of a worker: start the worker's own and wait for it."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    host, port = broadcast_from_rank_zero(_free_address() if rank == 0 else None)
    project = Path(job["project"])
    if not (project / job["data"] / "meta.json").is_file():
        raise RuntimeError(f"{SAID}host {socket.gethostname()}: no data in {project / job['data']}")
    environment = {
        **os.environ,
        **{"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": host, "MASTER_PORT": str(port)},
        # Of Ray's devices each worker sees its own only.
        **{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": _interface_towards(host)},
    }
    role = "lead" if rank == 0 else "follow"
    done = subprocess.Popen(
        [sys.executable, "-P", "-m", MODULE, role, json.dumps({**job, "boss": os.getpid()})],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    words = _printed(done, Path(job["log"]) if rank == 0 else None)
    if done.wait():
        raise RuntimeError(f"{SAID}rank {rank} on {socket.gethostname()} ended with {done.returncode} ({words})")


def _printed(process: subprocess.Popen[str], log: Path | None) -> str:
    """Keep what a process prints, and return the last line of it."""
    last = ""
    assert process.stdout is not None
    with log.open("w") if log else contextlib.nullcontext() as file:
        for line in process.stdout:
            last = line.strip() or last
            if file is not None:
                print(line, end="", file=file, flush=True)
    return last.removeprefix("error: ")


def _free_address() -> tuple[str, int]:
    """Return this host's address within the cluster, and a port that is free now."""
    import ray

    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as server:
        return host, server.getsockname()[1]


def _interface_towards(host: str) -> str:
    """Return the name of the network interface by which a host is reached."""
    from cnn_tuning.training.together import interface_of

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return interface_of(probe.getsockname()[0])


def lead(job: dict[str, Any]) -> None:
    """Run the stage `train` as rank 0."""
    from cnn_tuning.stages.command import stage
    from cnn_tuning.stages.train import TrainConfig, run

    inputs = Path(job["data"]).parent.parent  # below it the stage looks for data/prepared
    sys.argv = ["train", *job["overrides"], "--inputs", str(inputs), "--outputs", job["out"]]
    stage(TrainConfig, run, "Train as rank 0.")


def follow(job: dict[str, Any]) -> None:
    """Train beside rank 0."""
    import torch
    import torch.distributed as dist

    from cnn_tuning.data.packed import PackedData
    from cnn_tuning.training import follower
    from cnn_tuning.training.ranks import is_lost, outer_ranks

    ranks = outer_ranks()
    assert ranks is not None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=follower.PATIENCE)
        follower.follow(ranks, PackedData.open(Path(job["data"])))
    except UserError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not is_lost(error):
            raise
        sys.exit("error: another worker is gone")


def main() -> None:
    """Do a worker's part: `lead` or `follow`, as the arguments say."""
    from cnn_tuning.machine import end_with, prepare_process

    job = json.loads(sys.argv[2])
    prepare_process()
    end_with(job["boss"])
    {"lead": lead, "follow": follow}[sys.argv[1]](job)


if __name__ == "__main__":
    main()
