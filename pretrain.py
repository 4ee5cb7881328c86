"""Train a model from scratch on the bundled artwork: a vision-language model on scenes, with its pretraining losses, a
vision transformer on single glyphs, with their labels, a diffusion transformer to draw glyphs.

    python pretrain.py -m xvlm --precision bf16-mixed
    python pretrain.py -m dino --config configs/dino/pretrain_mini.yaml --output_dir output/dino_mini

A run that was stopped goes on from the last checkpoint in its --output_dir when the same command is given again.
"""

import argparse
import dataclasses
from pathlib import Path

import models
from configs.loading import load_config, read_yaml, save_config
from configs.pretraining import PRETRAIN_CONFIGS, TrainingConfig
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_device_options
from sparsity.files import check_writable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("-m", "--model", default="xvlm", metavar="MODEL", help=f"{', '.join(models.NAMES)} (default: %(default)s)")
    add("--config", type=Path, help="default: configs/<model>/pretrain_mini.yaml")
    add("--output_dir", type=Path, help="default: output/<model>_mini")
    add_device_options(parser)
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> TrainingConfig:
    """Everything that can be refused before heavy imports; also resolves the defaults that follow from the model."""
    models.check(args.model)
    args.config = args.config or Path("configs", args.model, "pretrain_mini.yaml")
    args.output_dir = args.output_dir or Path("output", f"{args.model}_mini")
    config = load_config(args.config, PRETRAIN_CONFIGS[models.KINDS[args.model]])
    read_yaml(config.model_config)
    check_writable(args.output_dir, "--output_dir")
    return config


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    config = check(args)

    import torch

    from engine.export import save_weights
    from engine.ranks import place_of
    from engine.training.fit import Run, fit
    from engine.training.optimizer import after_each_step, build_optimizer
    from engine.training.pretraining import PRETRAINING
    from engine.training.schedule import cooldown, warmup_cosine
    from models.parts.pretraining import AROUND

    kind, module = models.KINDS[args.model], models.find(args.model)
    course = PRETRAINING[kind](module, config, str(args.config), args.seed)
    fabric = launch(args, args.output_dir, unused_parameters=course.unused_parameters, broadcast_buffers=False)
    model = module.build(course.sizes)
    around = AROUND[kind](model, **course.options)
    result = around.result
    plain = build_optimizer(around, config, args.precision)
    after_each_step(plain, around.on_step)
    trained, optimizer = fabric.setup(around, plain)
    steps = len(course.data)

    def rate(step: int) -> float:
        cosine = warmup_cosine(step, config.horizon or steps, config.warmup, floor=0.01)
        return cosine * cooldown(step, steps, config.cooldown)

    training = Run(
        fabric=fabric,
        model=trained,
        optimizer=optimizer,
        rate=rate,
        steps=steps,
        output_dir=args.output_dir,
        identity={
            "model": dataclasses.asdict(course.sizes),
            "training": dataclasses.asdict(config),
            **{name: getattr(args, name) for name in ("seed", "precision", "devices", "num_nodes")},
        },
        seed=args.seed,
        clip_norm=config.clip_norm,
        save_every=config.save_every,
        validate_every=config.validate_every,
        validate=course.validation(result, fabric, args.output_dir),
    )
    start = training.resume()
    if start == steps and not training.unvalidated and fabric.is_global_zero:
        print(f"this run is finished; delete {training.checkpoint_path} to train again")
    if fabric.is_global_zero:
        save_config(config, args.output_dir / "config.yaml")
    fit(training, course.data.steps(start, place_of(fabric)), start)
    if fabric.is_global_zero:
        file = args.output_dir / f"{args.model}.safetensors"
        half = {"dtype": torch.float16, "allowed": ("vanished",)}
        path = save_weights(result, file, **half, without=module.REBUILT, tied_once=True)
        print(f"weights: {path}\nlog: {args.output_dir / 'log.csv'}")
    fabric.barrier()


if __name__ == "__main__":
    run(main)
