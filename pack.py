"""Store a sparse checkpoint without its zeros, or make it dense-shaped again.

    python pack.py output/pruned/vit_mini.wanda24.pt output/pruned/vit_mini.packed.safetensors
    python pack.py output/pruned/vit_mini.packed.safetensors vit_mini.safetensors --unpack

2:4 takes 9/16 of the dense size in 16 bits, any other sparsity its values and a bit for each weight; what that would
not make smaller stays as it is. Every script of this project reads packed checkpoints as they are; unpacked, they are
plain safetensors, as timm and transformers load them. Learned masks (`*.gate`) become zeros first.
"""

import argparse
from pathlib import Path

from engine.launch import run
from engine.options.command_line import Parser
from sparsity.errors import MissingFileError, UserError
from sparsity.files import check_writable

DTYPES = ("float32", "float16", "bfloat16")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, help="checkpoint: safetensors, packed or not, or what torch.save wrote")
    add("target", type=Path, help="file to write, .safetensors")
    add("--unpack", action="store_true", help="write all weights, zeros too (default: no)")
    add("--dtype", choices=DTYPES, help="of floating-point weights (default: as they are)")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Everything that can be refused before heavy imports."""
    if not args.source.is_file():
        raise MissingFileError(f"{args.source}: there is no such file")
    if args.target.suffix != ".safetensors":
        raise UserError(f"{args.target}: the file to write must be a .safetensors file")
    if args.target.resolve() == args.source.resolve():
        raise UserError(f"{args.target}: is the checkpoint itself: give another file to write")
    check_writable(args.target.parent, "target")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check(args)

    import torch

    from engine.export import save_state
    from models.checkpoint import read_weights
    from sparsity.learned.checkpoint import fold

    state = fold(read_weights(args.source))
    if args.dtype:
        dtype = getattr(torch, args.dtype)
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_state(state, args.target, packed=not args.unpack)
    dense = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    size = args.target.stat().st_size
    print(f"{args.target}: {size / 1e6:.2f} MB, {100 * size / dense:.1f} % of the {dense / 1e6:.2f} MB of all weights")


if __name__ == "__main__":
    run(main)
