"""Train a vision-language model from scratch on the bundled scenes, with its pretraining losses.

    python pretrain.py -m xvlm --config configs/xvlm/pretrain_mini.yaml --precision bf16-mixed --output_dir output/xvlm_mini

A run that was stopped goes on from the last checkpoint in its --output_dir when the same command is given again.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
from engine.config import load_config, save_config
from engine.launch import add_device_options, launch, run

REGION_SEED = 1000  # region scenes come from other random streams than the general ones


@dataclasses.dataclass(frozen=True)
class Stage:
    """Part of a curriculum: `steps` batches of scenes with up to `max_objects` glyphs."""

    steps: int
    batch_size: int
    max_objects: int
    objectives: list[str]
    region_images: int = 0
    fused_pairs: int | None = None


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    model_config: str
    stages: list[Stage]
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.98)
    warmup: int = 200
    clip_norm: float = 1.0
    workers: int = 1
    epoch_length: int = 20000
    validate_every: int = 250
    validation_scenes: int = 300
    save_every: int = 200


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="xvlm", help="xvlm (default)")
    parser.add_argument("--config", default="configs/xvlm/pretrain_mini.yaml", help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, default=Path("output/xvlm_mini"), help="default: %(default)s")
    add_device_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    module = models.find(args.model)
    config = load_config(args.config, PretrainConfig)
    model_config = load_config(config.model_config, module.Config)

    import torch

    from datasets.bundled import load_glyphs
    from datasets.text import TextEncoder
    from engine.export import save_weights
    from engine.fit import Run, fit
    from engine.optimizer import adamw
    from engine.schedule import warmup_cosine
    from models.pretraining import Sources
    from models.tokenizer import WordPiece

    glyphs = load_glyphs()
    encode = TextEncoder(WordPiece(model_config.vocab), model_config.max_tokens)
    fabric = launch(args, unused_parameters=True)
    model = module.build(model_config)
    sources, optimizer = fabric.setup(
        Sources(model), adamw(model, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas)
    )
    steps = sum(stage.steps for stage in config.stages)
    training = Run(
        fabric=fabric,
        model=sources,
        optimizer=optimizer,
        rate=lambda step: warmup_cosine(step, steps, config.warmup, floor=0.01),
        steps=steps,
        output_dir=args.output_dir,
        identity={"model": dataclasses.asdict(model_config), "training": dataclasses.asdict(config), "seed": args.seed},
        seed=args.seed,
        clip_norm=config.clip_norm,
        save_every=config.save_every,
        validate_every=config.validate_every,
        validate=lambda: validation(model, glyphs, encode, config, fabric.device),
    )
    start = training.resume()
    if fabric.is_global_zero:
        save_config(config, args.output_dir / "config.yaml")
    fit(training, curriculum(config, model_config, glyphs, encode, fabric, start, args.seed), start)
    if fabric.is_global_zero:
        path = save_weights(model, args.output_dir / f"{args.model}.safetensors", dtype=torch.float16)
        print(f"weights: {path}\nlog: {args.output_dir / 'log.csv'}")


def curriculum(config: PretrainConfig, sizes: Any, glyphs: Any, encode: Any, fabric: Any, start: int, seed: int) -> Iterator:
    """The arguments of `Sources.forward` from step `start` on, stage after stage."""
    from datasets.bundled import BundledRegions, BundledScenes
    from datasets.collate import collate, collate_regions
    from datasets.loaders import loader

    first = 0
    for number, stage in enumerate(config.stages):
        done, first = max(0, start - first), first + stage.steps
        if done >= stage.steps:
            continue
        common = {"side": sizes.vision.image_size, "max_objects": stage.max_objects, "seed": seed + number}
        order = {"seed": seed + number, "start": done, "stop": stage.steps, "workers": config.workers}
        order |= {"rank": fabric.global_rank, "world_size": fabric.world_size}
        sources = {
            "general": loader(
                BundledScenes(glyphs, encode, config.epoch_length, **common), stage.batch_size, collate, **order
            )
        }
        if stage.region_images:
            regions = BundledRegions(
                glyphs, encode, config.epoch_length, patch=sizes.vision.patch_size, **common | {"seed": seed + REGION_SEED + number}
            )
            sources["region"] = loader(regions, stage.region_images, collate_regions, **order)
        for batches in zip(*sources.values(), strict=True):
            yield {
                "sources": fabric.to_device(dict(zip(sources, batches, strict=True))),
                "objectives": stage.objectives,
                "fused_pairs": stage.fused_pairs,
            }


def validation(model: Any, glyphs: Any, encode: Any, config: PretrainConfig, device: Any) -> dict[str, float]:
    """Zero-shot recall over scenes of the test stream, by contrastive similarity alone."""
    from datasets.bundled import BundledRetrieval
    from datasets.retrieval import recall
    from engine.retrieval import batches_of, retrieval_scores

    items = BundledRetrieval(glyphs, "scenes", config.validation_scenes, side=model.config.vision.image_size)
    texts = encode.plain([items.scene(i).caption for i in range(len(items))])
    scores = retrieval_scores(model, batches_of(items), texts, k_test=0, device=device)
    own = list(range(len(items)))
    metrics = recall(*scores, own, [[i] for i in own])
    return {f"validation/{name}": metrics[name] for name in ("txt_r1", "img_r1", "r_mean")}


if __name__ == "__main__":
    run(main)
