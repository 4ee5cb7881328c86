"""Export a pruned model to what other programs load, and check what was written.

    python export.py -m dino --mask output/omp/dino_omp_90_seed42_pruning_masks.safetensors
    python export.py -m xvlm --weights pruned.safetensors --formats dense,packed
    python export.py -m blip --task captioning --weights output/blip_captioning/result
    python export.py -m timm:vit_base_patch16_224 --mask MASK --formats onnx,int8 --output_dir output/vit_b

dense: a folder that timm or transformers loads (of models of this project: weights and sizes), with a model card.
packed: without zeros, as pack.py writes it. onnx: each part (classifier, vision and text towers, step of a decoder) for
any batch size, compared with the model on bundled and random inputs, and the commands for TensorRT. int8: ONNX with
weights in int8. Weights may be dense ones with a --mask, pruned, fine-tuned or packed ones, or learned masks (MaskLLM);
a file, or a folder. --task: fine-tuned ones of a model of this project, for the images that they were tuned on.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import models
from configs.loading import sizes_beside
from configs.pruning import PrunedModel
from engine.deployment.options import add_model_options, check_files, configured
from engine.launch import launch, run, script
from engine.options import command_line as options
from sparsity.errors import UserError

FORMATS = ("dense", "packed", "onnx", "int8")
TASKS = ("retrieval", "captioning", "vqa", "classification")
DTYPES = ("float32", "float16", "bfloat16")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, help="what the weights were fine-tuned for (default: nothing)")
    some = f"comma separated (default: {','.join(FORMATS)})"
    add("--formats", type=options.among(FORMATS, "format"), default=list(FORMATS), help=some)
    add("--packed_dtype", choices=DTYPES, help="of the weights of the packed file (default: as they are)")
    add_model_options(parser, "output/export", models.NAMES, models.ANY)
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> PrunedModel:
    """Everything that can be refused before heavy imports."""
    if args.task and models.kind(args.model) == "external":
        raise UserError("--task is for models of this project: leave it out, and give the result's folder to -m")
    if args.task:
        models.check_task(args.model, args.task)
    config = configured(args, models.kind(args.model), models.NAMES, models.ANY)
    told = args.config or args.variant != "auto" or not args.task or not args.weights
    sizes = None if told else sizes_beside(args.weights)
    config = dataclasses.replace(config, model_config=sizes) if sizes else config
    if args.packed_dtype and "packed" not in args.formats:
        raise UserError("--packed_dtype is for --formats packed: leave it out")
    check_files(args, config, "--formats", args.formats)
    args.accelerator = "cpu"  # what is written does not depend on it
    return config


def files_beside(name: str, sizes: Any) -> dict[str, dict[str, Any]]:
    """Return the files beside the weights of a model of this project, name -> content; others have their own."""
    if models.kind(name) == "external":
        return {}
    if name in models.of_task("published"):
        return models.find_task(name, "published").files(sizes)
    return {"config.json": dataclasses.asdict(sizes)}


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    config = check(args)

    import torch

    from engine.deployment.dense_files import write_dense
    from engine.deployment.exporting import export_onnx
    from engine.deployment.loading import masks_of, zeros_of
    from engine.deployment.packed_files import write_packed
    from engine.deployment.real_inputs import bundled_inputs
    from engine.pruning.data_kinds import SUBJECTS
    from models.fine_tuned import load_task
    from models.parts.graphs import graphs_of
    from sparsity.casting import casting

    fabric, folder = launch(args, args.output_dir), args.output_dir
    subject = SUBJECTS[models.kind(args.model)](models.find(args.model), config)
    if args.task:
        view, sizes, side = load_task(args.model, args.task, subject.sizes, config.checkpoint)
    else:
        view, sizes, side = subject.load(fabric), subject.sizes, 0
    if args.mask:
        masks_of(view, args.mask).apply(view)
    masks, names = zeros_of(view), [key for weight in view.weights.values() for key in weight.aliases]
    if "dense" in args.formats:
        command = shlex.join(["python", Path(sys.argv[0]).name, *(arguments or sys.argv[1:])])
        facts = {"model": args.model, "weights": config.weights} | ({"mask": str(args.mask)} if args.mask else {})
        write_dense(view, folder / "dense", files_beside(args.model, sizes), masks, facts, command)
        print(f"{folder / 'dense'}: {100 * masks.report(view).overall.sparsity:.2f} % of the prunable weights are zero")
    if "packed" in args.formats:
        state, path = view.model.state_dict(), folder / "model.packed.safetensors"
        if args.packed_dtype:
            state = casting(state, getattr(torch, args.packed_dtype), allowed=("vanished",))
        print(f"{path}: {write_packed(state, path, names)}")
    if {"onnx", "int8"} & set(args.formats):
        graphs = graphs_of(view.model, side)
        real = bundled_inputs(graphs, subject.encode if models.kind(args.model) == "pairs" else None)
        for name, told in export_onnx(graphs, folder / "onnx", real, "int8" in args.formats):
            print(f"{folder / 'onnx' / name}: {told}", flush=True)


if __name__ == "__main__":
    run(main)
