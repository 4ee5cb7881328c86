"""Store a sparse checkpoint without its zeros, or make it dense-shaped again.

    python pack.py output/pruned/vit_mini.wanda24.pt output/pruned/vit_mini.packed.safetensors
    python pack.py output/pruned/vit_mini.packed.safetensors vit_mini.safetensors --unpack

2:4 takes 9/16 of the dense size in 16 bits, any other sparsity its values and a bit for each weight; what that would
not make smaller, and what is quantised, stays as it is. Every script of this project reads packed checkpoints as they
are; unpacked, they are plain safetensors, as timm and transformers load them. Tensors are read, packed and written one
at a time, so that a model need not fit into memory. Learned masks (`*.gate`) become zeros first. Values that --dtype
cannot hold are counted, and refused unless --allow_loss is given.
"""

import argparse
from pathlib import Path

from engine.launch import run
from engine.options.command_line import Parser
from sparsity.errors import MissingFileError, UserError
from sparsity.files import check_writable, weights_files

ALLOWED = {"vanished": ("vanished",), "all": ("vanished", "overflowed")}
DTYPES = ("float32", "float16", "bfloat16")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "source", type=Path, help="checkpoint: safetensors, packed or not, what torch.save wrote, or a folder of shards"
    )
    add("target", type=Path, help="file to write, .safetensors")
    add("--unpack", action="store_true", help="write all weights, zeros too (default: no)")
    add("--dtype", choices=DTYPES, help="of floating-point weights, quantised ones apart (default: as they are)")
    allowed = "write also what --dtype cannot hold: values that become 0, or infinite too (default: refuse)"
    add("--allow_loss", choices=ALLOWED, help=allowed)
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Everything that can be refused before heavy imports."""
    if not weights_files(args.source):
        raise MissingFileError(f"{args.source}: there is no such file")
    if args.target.suffix != ".safetensors":
        raise UserError(f"{args.target}: the file to write must be a .safetensors file")
    if args.target.resolve() == args.source.resolve():
        raise UserError(f"{args.target}: is the checkpoint itself: give another file to write")
    if args.allow_loss and not args.dtype:
        raise UserError("--allow_loss is for --dtype, without which nothing is lost: leave it out")
    check_writable(args.target.parent, "target")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check(args)

    import torch

    from engine.deployment.packed_files import write_packed
    from engine.export import save_state
    from models.checkpoint import stored_weights
    from sparsity.casting import casting
    from sparsity.learned.checkpoint import folding

    state = folding(stored_weights(args.source))
    if args.dtype:
        allowed = ALLOWED.get(args.allow_loss, ())
        way_out = f"--allow_loss {' or '.join(ALLOWED)} writes them all the same"
        try:
            state = casting(state, getattr(torch, args.dtype), allowed=allowed, way_out=way_out)
        except UserError as error:
            raise UserError(f"{args.source}: {error}") from None
    if not args.unpack:
        print(f"{args.target}: {write_packed(state, args.target)}")
        return
    save_state(state, args.target)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
