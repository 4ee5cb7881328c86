"""Start of every script: user errors as one line, Fabric on the devices that were asked for, seeds, what is logged."""

import argparse
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import locks, stopping
from engine.exit_codes import BUG, DONE, INTERRUPTED, STOPPED, exit_code, told
from engine.ranks import OtherRankError, on_leader, peers
from sparsity.errors import UserError

PACKAGES = ("configs", "datasets", "engine", "models", "pruners", "sparsity")
WORKER = "Original Traceback (most recent call last)"  # in the message of an error from a DataLoader worker
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # the first that is set counts


def run(main: Callable[[], None]) -> None:
    """Call `main` and end as engine/exit_codes.py says: what the user can mend, or make room for, is one line on
    stderr, a bug has its traceback. With several ranks the one that fails first says so, and all end with its code.
    """
    # Before torch is loaded: threads that wait by spinning slow a run more than tenfold where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack traces of torch where a rank has gone
    rank = _rank()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.WARNING if rank else logging.INFO)
    code: int = DONE
    try:
        with stopping.listening():
            main()
    except Exception as error:
        code = _failed(error, rank)
        if code == BUG:
            raise
    except stopping.Stopped as stopped:
        code = _ended(STOPPED, f"stopped by {stopped}: the same command goes on", rank)
    except KeyboardInterrupt:
        code = peers.code or _ended(INTERRUPTED, "\ninterrupted", rank)  # below a progress bar
    finally:
        locks.release_all()
        peers.leave(code)
    if code != DONE:
        sys.exit(code)


def _failed(error: Exception, rank: int) -> int:
    """Tell what has failed, unless another rank has done so; returns the exit code."""
    if isinstance(error, OtherRankError):
        return error.code
    code, line = exit_code(error), told(error)
    if isinstance(error, RuntimeError) and peers.lost():  # as of a broken connection
        if not peers.alone:
            return peers.code
        code, line = peers.code, "rank 0 of this run is gone"
    return _ended(code, line and f"error: {_line(line)}", rank)


def _ended(code: int, line: str | None, rank: int) -> int:
    """Tell the user, on the rank that is the first to end; returns the exit code of all."""
    if not peers.first(code):
        return peers.code or code
    for bar in list(getattr(tqdm, "_instances", ())):  # the line begins where a progress bar was
        bar.close()
    if line is not None:
        print(line.replace("error:", f"error (rank {rank}):", 1) if rank else line, file=sys.stderr)
    return code


def script(main: Callable[..., None]) -> Callable[..., None]:
    """The `main` of a script that writes to a folder: the folder is given back when it ends, however that is."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> None:
        try:
            main(arguments)
        finally:
            locks.release_all()

    return wrapped


def _rank() -> int:
    """Number of this process, known before anything is launched: 0 in the one that the user started."""
    return int(next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), 0))


def _line(text: str) -> str:
    """The message in one line; of a DataLoader worker's, which holds a traceback, the end."""
    text = text.strip()
    if WORKER in text:
        text = text.rpartition("\n")[2].partition(": ")[2]
    return " ".join(text.split())


def _sync_option() -> str:
    """DDP's name for `sync_buffers`: torch 2.14 renamed it, and warns of the old one."""
    from torch.nn.parallel import DistributedDataParallel

    new = "forward_sync_buffers"
    return new if new in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"


def launch(
    args: argparse.Namespace,
    folder: Path | None = None,
    *,
    unused_parameters: bool = False,
    sync_buffers: bool = True,
) -> Any:
    """Fabric on the devices that were asked for, its processes started and seeded, its arithmetic set.

    folder: where the run writes, which it holds alone from here on (see `engine.locks`). unused_parameters: some
    parameters get no gradient in some steps (DDP must look for them). sync_buffers: DDP sends rank 0's buffers in each
    forward, for models with statistics of batches; needless where all ranks compute the same ones, as BLIP's queues.
    Raises UserError where there are no such devices, or another run holds the folder.
    """
    from lightning.fabric import Fabric, seed_everything
    from lightning.fabric.strategies import DDPStrategy

    for name in ("lightning.fabric", "lightning.pytorch"):  # they set their own level when they are imported
        logging.getLogger(name).setLevel(logging.WARNING)
    if getattr(args, "verbose", False) and not _rank():
        for package in PACKAGES:
            logging.getLogger(package).setLevel(logging.DEBUG)
    set_arithmetic(args)
    strategy = "auto"
    if args.strategy == "ddp" or args.devices * args.num_nodes > 1:
        taught_only = getattr(args, "distill", None) == 1  # what the loss of the task alone reads gets no gradient
        options = {"find_unused_parameters": unused_parameters or taught_only}
        if not sync_buffers:
            options[_sync_option()] = False
        strategy = DDPStrategy(**options)
    try:
        fabric = Fabric(
            accelerator=_accelerator(args.accelerator),
            devices=args.devices,
            num_nodes=args.num_nodes,
            strategy=strategy,
            precision=args.precision,
        )
    except UserError:
        raise
    except Exception as error:  # each accelerator raises its own kind
        wanted = f"--accelerator {args.accelerator} --devices {args.devices} --num_nodes {args.num_nodes}"
        raise UserError(f"{wanted}: {error}") from error
    fabric.launch()
    peers.watch()
    if folder is not None:
        on_leader(fabric, functools.partial(locks.hold, folder))
    seed_everything(args.seed, verbose=False)
    return fabric


def _accelerator(wanted: str) -> str:
    """Return the accelerator that Fabric is asked for. MPS is refused, since it has no float64, in which masks and
    statistics are computed.
    """
    import torch

    if torch.cuda.is_available() or not torch.backends.mps.is_available():
        return wanted
    if wanted in ("mps", "gpu"):
        raise UserError(f"--accelerator {wanted}: MPS has no float64, which pruning needs: give --accelerator cpu")
    return "cpu"


def set_arithmetic(args: argparse.Namespace) -> None:
    """Set the precision of float32 products (`--tf32`) and whether algorithms are reproducible (`--deterministic`)."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(args.deterministic)
