"""Start of every script: user errors as one line, Fabric on the devices that were asked for, seeds, what is logged."""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from engine.exit_codes import BAD_INPUT, INTERRUPTED
from sparsity.errors import UserError

PACKAGES = ("configs", "datasets", "engine", "models", "pruners", "sparsity")
WORKER = "Original Traceback (most recent call last)"  # in the message of an error from a DataLoader worker
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # the first that is set counts


def run(main: Callable[[], None]) -> None:
    """Call `main`; what the user can mend ends the program with one line on stderr and exit code 2, a bug with its
    traceback.

    The user's errors are `UserError` and files (OSError).
    """
    # Before torch is loaded: threads that wait by spinning slow a run more than tenfold where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rank = _rank()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.WARNING if rank else logging.INFO)
    try:
        main()
        _leave()
    except (UserError, OSError) as error:
        print(f"error{f' (rank {rank})' if rank else ''}: {_line(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        if not rank:
            print("\ninterrupted", file=sys.stderr)  # below a progress bar
        sys.exit(INTERRUPTED)


def _leave() -> None:
    """End the group of processes, if there is one, while Python is whole.

    Lightning does so for NCCL alone. Threads of gloo that are there when the interpreter ends are stopped as they ask
    for its lock, and C++ may answer with "terminate called without an active exception".
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _rank() -> int:
    """Number of this process, known before anything is launched: 0 in the one that the user started."""
    return int(next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), 0))


def _line(error: Exception) -> str:
    """The message in one line; of a DataLoader worker's, which holds a traceback, the end."""
    text = str(error).strip()
    if WORKER in text:
        text = text.rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split())


def _sync_option() -> str:
    """DDP's name for `sync_buffers`: torch 2.14 renamed it, and warns of the old one."""
    from torch.nn.parallel import DistributedDataParallel

    new = "forward_sync_buffers"
    return new if new in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"


def launch(args: argparse.Namespace, *, unused_parameters: bool = False, sync_buffers: bool = True) -> Any:
    """Fabric on the devices that were asked for, its processes started and seeded.

    unused_parameters: some parameters get no gradient in some steps (DDP must look for them). sync_buffers: DDP sends
    rank 0's buffers in each forward, for models with statistics of batches; needless where all ranks compute the same
    ones, as BLIP's queues. Raises UserError where there are no such devices.
    """
    from lightning.fabric import Fabric, seed_everything
    from lightning.fabric.strategies import DDPStrategy

    for name in ("lightning.fabric", "lightning.pytorch"):  # they set their own level when they are imported
        logging.getLogger(name).setLevel(logging.WARNING)
    strategy = "auto"
    if args.strategy == "ddp" or args.devices * args.num_nodes > 1:
        options = {"find_unused_parameters": unused_parameters}
        if not sync_buffers:
            options[_sync_option()] = False
        strategy = DDPStrategy(**options)
    try:
        fabric = Fabric(
            accelerator=args.accelerator,
            devices=args.devices,
            num_nodes=args.num_nodes,
            strategy=strategy,
            precision=args.precision,
        )
    except Exception as error:  # each accelerator raises its own kind
        wanted = f"--accelerator {args.accelerator} --devices {args.devices} --num_nodes {args.num_nodes}"
        raise UserError(f"{wanted}: {error}") from error
    fabric.launch()
    seed_everything(args.seed, verbose=False)
    return fabric
