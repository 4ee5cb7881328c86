"""The command line of a task script and its configuration, checked before anything heavy is imported."""

import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from configs.loading import configure, read_yaml
from configs.locations import located
from configs.task import TaskConfig
from engine.contents import texts
from engine.options.command_line import check_loggers
from engine.options.sparse_training import check_sparse_training, sparse_options
from sparsity.errors import MissingFileError, UserError
from sparsity.files import check_writable

T = TypeVar("T", bound=TaskConfig)


def prepare(args: Namespace, task: str, schema: type[T], arguments: Sequence[str] | None = None) -> T:
    """The configuration of a run of <task>.py; `args.config` becomes the file that it is from, `args.command` what was
    typed.

    args: of `engine.options.command_line.add_finetuning_options`. arguments: what `args` was parsed from. Raises
    UserError or OSError for whatever keeps the run from beginning: neither mask nor --dense, files that are missing,
    sizes of batches that do not go together, packages of loggers that are not installed.
    """
    if args.evaluate and args.skip_eval:
        raise UserError("--evaluate only evaluates, and --skip_eval does not: leave one of them out")
    if args.dense or (args.evaluate and args.mask is None):
        args.mask = None
    elif args.mask is None:
        raise UserError("give --mask FILE to train a pruned model, or --dense to train the dense one")
    elif not args.mask.is_file():
        raise MissingFileError(f"--mask {args.mask}: mask file not found; prune.py writes such files")
    if is_foreign(args.model):
        if args.variant != "auto":
            raise UserError(f"--variant is for models of this project: leave it out with {args.model}")
        args.config = args.config or located(Path("configs", "external", f"{task}.yaml"))
    args.config, config = configure(args, task, schema, base="")
    config = config.overridden(vars(args))
    refuse_nlvr2(str(args.config), *texts(asdict(config)))
    if config.model_config:
        read_yaml(config.model_config)
    config.check_weights()
    config.check_data(str(args.config))
    try:
        config.accumulation(args.devices * args.num_nodes)
    except ValueError as error:
        raise UserError(f"{args.config}: {error}") from error
    check_loggers(vars(args))
    sparse = sparse_options(args).name
    args.output_dir = args.output_dir or default_folder(args.model, task, args.config, args.mask, sparse)
    check_writable(args.output_dir, "--output_dir")
    args.snapshot = args.snapshot or Path(args.output_dir, "last.pt")
    if args.snapshot.is_dir():
        raise UserError(f"--snapshot {args.snapshot}: this is a folder; give the name of a file")
    check_writable(args.snapshot.parent, "--snapshot")
    check_sparse_training(args)
    args.command = shlex.join(["python", f"{task}.py", *(sys.argv[1:] if arguments is None else arguments)])
    return config


def refuse_nlvr2(*names: str) -> None:
    """Raise UserError where a file is one of NLVR2's, which none of the tasks is."""
    for name in names:
        if "nlvr" in Path(name).name.lower():
            raise UserError(
                f"{name}: NLVR2, a sentence that is true or false of two images, is none of the tasks here: retrieval, "
                "captioning, visual question answering and image classification are"
            )


def is_foreign(model: str) -> bool:
    """Return whether a model is one of another library: timm:NAME, hf:NAME_OR_FOLDER."""
    return ":" in model


def default_folder(model: str, task: str, config: Path, mask: Path | None, sparse: str = "") -> Path:
    """Return the default output folder of a run: each model, task, mask and way of sparse training has its own."""
    kind = config.stem if config.stem.startswith(task) else f"{task}_{config.stem}"
    name = "dense" if mask is None else mask.stem.removesuffix("_pruning_masks")
    return Path("output", f"{re.sub(r'[:/]+', '_', model)}_{kind}", f"{name}_{sparse}" if sparse else name)
