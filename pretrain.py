"""Train a vision-language model from scratch on the bundled scenes, with its pretraining losses.

    python pretrain.py -m xvlm --precision bf16-mixed
    python pretrain.py -m xvlm --config configs/xvlm/pretrain_mini.yaml --output_dir output/xvlm_mini

A run that was stopped goes on from the last checkpoint in its --output_dir when the same command is given again.
"""

import argparse
import dataclasses
from pathlib import Path

import models
from datasets.sources import Evaluation, PretrainConfig
from engine.config import load_config, read_yaml, save_config
from engine.files import check_writable
from engine.launch import launch, run
from engine.options import Parser, add_device_options


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("-m", "--model", default="xvlm", metavar="MODEL", help=f"{', '.join(models.NAMES)} (default: %(default)s)")
    add("--config", type=Path, default=Path("configs/xvlm/pretrain_mini.yaml"), help="default: %(default)s")
    add("--output_dir", type=Path, default=Path("output/xvlm_mini"), help="default: %(default)s")
    add_device_options(parser)
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> PretrainConfig:
    """Everything that can be refused before heavy imports."""
    models.check(args.model)
    config = load_config(args.config, PretrainConfig)
    read_yaml(config.model_config)
    check_writable(args.output_dir, "--output_dir")
    return config


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    config = check(args)

    import torch

    from datasets.bundled import load_glyphs
    from datasets.curriculum import Curriculum
    from datasets.text import TextEncoder
    from engine.export import save_weights
    from engine.fit import Run, fit
    from engine.optimizer import build_optimizer
    from engine.retrieval import ZeroShot
    from engine.schedule import cooldown, warmup_cosine
    from models.pretraining import Sources
    from models.tokenizer import WordPiece

    module = models.find(args.model)
    sizes = load_config(config.model_config, module.Config)
    for stage in config.stages:
        stage.check(module.OBJECTIVES, str(args.config))
    encode = TextEncoder(WordPiece(sizes.vocab), sizes.max_tokens)
    data = Curriculum(config, load_glyphs(), encode, sizes.vision, seed=args.seed)
    fabric = launch(args, unused_parameters=True)
    model = module.build(sizes)
    sources, optimizer = fabric.setup(Sources(model), build_optimizer(model, config, args.precision))
    steps = len(data)

    def rate(step: int) -> float:
        cosine = warmup_cosine(step, config.horizon or steps, config.warmup, floor=0.01)
        return cosine * cooldown(step, steps, config.cooldown)

    evaluation = Evaluation(k_test=0, bundled_scenes=config.validation_scenes)
    training = Run(
        fabric=fabric,
        model=sources,
        optimizer=optimizer,
        rate=rate,
        steps=steps,
        output_dir=args.output_dir,
        identity={
            "model": dataclasses.asdict(sizes),
            "training": dataclasses.asdict(config),
            **{name: getattr(args, name) for name in ("seed", "precision", "devices", "num_nodes")},
        },
        seed=args.seed,
        clip_norm=config.clip_norm,
        save_every=config.save_every,
        validate_every=config.validate_every,
        validate=ZeroShot(model, evaluation, encode, fabric, sizes.vision, args.output_dir),
    )
    start = training.resume()
    if fabric.is_global_zero:
        save_config(config, args.output_dir / "config.yaml")
    fit(training, data.steps(start, fabric.global_rank, fabric.world_size), start)
    if fabric.is_global_zero:
        path = save_weights(model, args.output_dir / f"{args.model}.safetensors", dtype=torch.float16)
        print(f"weights: {path}\nlog: {args.output_dir / 'log.csv'}")
    fabric.barrier()


if __name__ == "__main__":
    run(main)
