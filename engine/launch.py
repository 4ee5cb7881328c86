"""Start of every script: user errors as one line, Fabric with the asked devices, seeds."""

import argparse
import logging
import sys
from collections.abc import Callable

USER_ERROR = 2


def run(main: Callable[[], None]) -> None:
    """Call `main`; a ValueError or a file error ends the program with one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """`--devices`, `--num_nodes`, `--accelerator`, `--strategy`, `--precision`, `--seed`, as every script has them."""
    group = parser.add_argument_group("devices")
    group.add_argument("-d", "--devices", type=positive_int, default=1, help="devices per node")
    group.add_argument("--num_nodes", type=positive_int, default=1, help="nodes (under SLURM or torchrun)")
    group.add_argument("--accelerator", default="auto", help="auto, cpu, gpu, mps, ...")
    group.add_argument("--strategy", default="auto", help="auto or ddp")
    group.add_argument(
        "--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed"], help="arithmetic of the forward"
    )
    group.add_argument("--seed", type=int, default=42, help="seed of all randomness")


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def launch(args: argparse.Namespace, *, unused_parameters: bool = False):
    """Fabric on the devices that were asked for, its processes started and seeded.

    unused_parameters: some parameters get no gradient in some steps (DDP must look for them).
    """
    from lightning.fabric import Fabric, seed_everything
    from lightning.fabric.strategies import DDPStrategy

    strategy = args.strategy
    if strategy in ("auto", "ddp") and args.devices * args.num_nodes > 1:
        strategy = DDPStrategy(find_unused_parameters=unused_parameters)
    fabric = Fabric(
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=strategy,
        precision=args.precision,
    )
    fabric.launch()
    seed_everything(args.seed, verbose=False)
    return fabric
