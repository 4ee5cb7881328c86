"""Bad input, generated from the argument parsers and from the dataclasses of the configurations: exit code 2, one line
that names the option or the key, nothing written; what arguments and YAML alone decide, before torch is imported.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import yaml

import prune
from configs.finetuning import (
    CaptioningConfig,
    CaptioningPretrainConfig,
    ClassificationConfig,
    RetrievalConfig,
    VQAConfig,
)
from configs.foreign import (
    ForeignCaptioningConfig,
    ForeignClassificationConfig,
    ForeignRetrievalConfig,
    ForeignVQAConfig,
)
from configs.general_loader import ONE_VALUE, GeneralLoader
from configs.pretraining import PRETRAIN_CONFIGS, TrainingConfig
from configs.pruning import PRUNE_CONFIGS, PruneConfig, PrunedModel
from configs.sources import Files
from configs.task import TaskConfig
from datasets.calibration.data_kinds import Calibration
from datasets.tasks.retrieval import RetrievalEvalDataset
from datasets.text import TextEncoder
from datasets.transforms import EvalTransform
from engine.launch import run
from engine.options import command_line as options
from engine.options import external
from engine.options.command_line import Parser
from models.blip import model as blip
from models.dino import model as dino
from models.dit import model as dit
from models.parts.tokenizer import WordPiece
from models.xvlm import model as xvlm
from tests.processes import PATIENCE, error_line

pytestmark = pytest.mark.script

CONFIGS = Path("tests/data/configs")
MODEL = str(CONFIGS / "model.yaml")
HEAVY = ("torch", "torchvision", "lightning", "transformers", "timm", "matplotlib")
OUT = "TMP/out"  # TMP: a folder of the case's own

TUNING = {  # script that fine-tunes -> a model, and a configuration that would do
    "retrieval": ("xvlm", "retrieval.yaml"),
    "captioning": ("xvlm", "captioning.yaml"),
    "captioning_pretrain": ("xvlm", "captioning_pretrain.yaml"),
    "vqa": ("xvlm", "vqa.yaml"),
    "image_classification": ("dino", "dino_image_classification.yaml"),
}


def tuning(script: str) -> list[str]:
    model, config = TUNING[script]
    mask = ["--mask", "README.md"]  # which is opened after torch is there
    return ["--model", model, "--config", str(CONFIGS / config), "--output_dir", OUT, *mask]


# Arguments with which a script would run; bad ones follow, and the last counts.
RUNS = {
    **{script: tuning(script) for script in TUNING},
    "prune": ["-m", "xvlm", "-p", "omp", "--config", str(CONFIGS / "prune.yaml"), "--output_dir", OUT],
    "compare": ["-m", "xvlm", "-p", "omp", "--config", str(CONFIGS / "prune.yaml"), "--output_dir", OUT],
    "pretrain": ["--config", str(CONFIGS / "pretrain.yaml"), "--output_dir", OUT],
}

# Scripts without a configuration: what their parsers refuse by themselves.
PARSED = {
    "pack": ["data/vit_mini.safetensors", "TMP/packed.safetensors"],
    "sample": ["--model", "dit_mini", "--output", "TMP/sample.png"],
    "maskllm_train": ["--model", "vit_mini", "--output", OUT],
    "oneshot_pruning_timm": ["--model", "vit_mini", "--pruner", "magnitude"],
    "oneshot_pruning_dit": ["--pruner", "magnitude", "--output-dir", OUT],
    "timm_validate": ["--model", "vit_mini"],
}

# What the type of an option must refuse.
BAD_TEXTS = {
    options.positive_int: ("0", "-1", "1.5", "abc", "nan", "inf", ""),
    options.count: ("-1", "1.5", "abc", "nan", ""),
    options.positive_float: ("0", "-1", "abc", "nan", "inf", ""),
    options.share: ("-0.1", "1.1", "abc", "nan", "inf", ""),
    options.seed: ("-1", "4294967296", "1.5", "abc", ""),
    options.seeds: ("1,,2", "1,x", "-1", "4294967296", ""),
    options.byte_count: ("abc", "-1GB", "4XB", "nan", ""),
    options.globs: ("a,,b", ""),
    external.group_globs: ("a", "a=", "=b", "a=b,", ""),
}

# Of any other type: those of these that it refuses, which are not all.
TEXTS = ("", "abc", "-1", "0", "1.5", "nan", "inf", "1e400", "9" * 5000, "a,,b", "=b", "\u0663:\u0664")

# Options that are texts or paths: bad ones, and what is said of them.
BAD_VALUES = {
    "save_allocation": {"allocation.txt": "--save_allocation"},
    "from_mask": {"absent.safetensors": "absent.safetensors"},
    "from_weights": {"absent.safetensors": "--from_weights"},
    "teacher": {"absent.safetensors": "--teacher is for --distill W"},
    "pruner": {"multiflo": "did you mean 'multiflow'", "": "-p/--pruner", "base": "no pruner 'base'"},
    "pruners": {"omp,multiflo": "did you mean 'multiflow'", "": "no pruner ''", "omp,": "no pruner ''"},
    "model": {"xvml": "did you mean 'xvlm'", "": "no model ''"},
    "sparsities": {
        **{s: f"got '{s}'" for s in ("0", "100", "-5", "abc", "nan", "inf", "1e400", "", "-0.5", "101", "63%")},
        **{"63,,75": "got '' in '63,,75'", "63,": "got '' in '63,'", "50,0": "got '0'", "63;75": "got '63;75'"},
    },
    "pattern": {text: "pattern must be N:M" for text in ("4:2", "0:4", "2:2", "2-4", "2:4:8", "", "a:b", "-1:4")},
    "weights": {"absent.pth": "absent.pth: weights file not found; give --"},
    "mask": {
        "absent.safetensors": "--mask absent.safetensors: mask file not found",
        "data": "--mask data",
        "": "--mask ",
    },
    "snapshot": {"README.md/last.pt": "--snapshot README.md", "data": "--snapshot data: ", "": "--snapshot "},
    "experiment_name": {},  # whatever one likes
    "plans": {
        "absent.yaml": "absent.yaml: configuration file not found",
        "data/xvlm_mini.safetensors": "data/xvlm_mini.safetensors: not valid YAML",
    },
    "recipe": {
        "absent.yaml": "--recipe absent.yaml: there is no such file",
        "data": "--recipe data: there is no such file",
        "README.md": "README.md: expected a recipe between two lines ---",
        "data/xvlm_mini.safetensors": "data/xvlm_mini.safetensors: not valid YAML",
        "LICENSE": "LICENSE",
        "": "--recipe .: there is no such file",
    },
    "finetuned": {"absent": "give one of -m/--model"},
    "nm": {"absent": "give one of -m/--model"},
    "quality": {"absent": "give one of -m/--model"},
    "pruned": {"absent": "give one of -m/--model"},
    "records": {"absent": "give one of -m/--model"},
    "tradeoff": {"absent": "give one of -m/--model"},
    "data": {"absent.json": "--data absent.json: there is no such file"},
    "val_data": {"absent.json": "--val_data is for data of one's own"},
    "optimizer_name": {"adamx": "opt must be one of adamW, sgd, got 'adamx'"},
    "aa": {"rand-m9": "--aa is for models of timm and transformers"},
    "config": {
        "absent.yaml": "absent.yaml: configuration file not found",
        "README.md": "README.md: not valid YAML",
        "data/xvlm_mini.safetensors": "data/xvlm_mini.safetensors: not valid YAML",
        "configs": "configs: configuration file not found",
    },
    "output_dir": {
        "README.md": "--output_dir README.md",
        "README.md/below": "--output_dir README.md/below",
        "/proc/results": "--output_dir /proc/results",
    },
    "calibration": {"photos": "--calibration is for other models"},
    "evaluation": {"photos": "--evaluation is for other models"},
    "push_to_hub": {"me/model": "--push_to_hub is for other models"},
    "weights_key": {"state_dict": "--weights_key is for "},
    "class_map": {"map.json": "--class_map is for other models"},
    "loss": {"a.b:c": "--loss is for other models"},
}


class Case(NamedTuple):
    """A script's arguments, YAML files by name, and what the one line must hold."""

    script: str
    arguments: list[str]
    told: list[str]
    files: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return f"{self.script} {' '.join(self.arguments)} {json.dumps(self.files)}"


def parser_of(script: str) -> Parser:
    """The parser that a script makes."""
    made = []

    def stop(parser: Parser, *_: Any) -> None:
        made.append(parser)
        raise SystemExit

    with mock.patch.object(Parser, "parse_args", stop), contextlib.suppress(SystemExit):
        importlib.import_module(script).parse([])
    return made[0]


def bad_arguments(script: str) -> Iterator[Case]:
    """For every option: values that it must refuse, none at all, its name misspelt, and it left out if it is needed."""
    good = (RUNS | PARSED)[script]
    for action in (action for action in parser_of(script)._actions if action.option_strings and action.dest != "help"):
        shown, long = "/".join(action.option_strings), action.option_strings[-1]
        if action.nargs == 0:
            yield Case(script, [*good, f"{long}=yes"], [shown, "'yes'"])
        else:
            yield Case(script, [*good, long], [shown, "expected "])
            for text, told in bad_values(action, script in RUNS):
                yield Case(script, [*good, f"{long}={text}"], [told or shown])
        yield Case(script, [*good, misspelt(long)], [misspelt(long), "did you mean --"])
        if action.required:
            place = next(i for i, given in enumerate(good) if given in action.option_strings)
            yield Case(script, good[:place] + good[place + 2 :], [f"required: {shown}"])
    yield Case(script, [*good, "stray"], ["unrecognized argument stray"])


def bad_values(action: Any, meant: bool = True) -> Iterator[tuple[str, str]]:
    """(text, what is said of it; empty where the name of the option will do). meant: texts and paths, too."""
    if action.choices is not None:
        yield from ((text, "") for text in ("nonsense", "", str(next(iter(action.choices)))[:-1]))
    elif action.dest in BAD_VALUES:
        yield from BAD_VALUES[action.dest].items() if meant else ()
    elif action.type not in (None, str, Path):
        yield from ((text, "") for text in BAD_TEXTS.get(action.type) or filter(partial(refuses, action.type), TEXTS))


def refuses(kind: Callable[[str], Any], text: str) -> bool:
    try:
        kind(text)
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return True
    return False


def misspelt(word: str) -> str:
    """With the last letter twice."""
    return word + word[-1]


# Configurations

FILES = {"annotations": "a.json", "images": "images", "roots": {"cc3m": "images"}}
STAGE = {"steps": 1, "batch_size": 2, "max_objects": 1, "objectives": ["itc"], "region_images": 1, "fused_pairs": 1}
IMAGES = {"dataset": "imagenet", "split": "train", "root": "data/imagenet"}
PRUNED = {"model_config": MODEL, "weights": "random", "batch_size": 2, "workers": 0, "max_skipped": 0.5}
DECODED = {"exif_rotation": True, "transparency": "white", "max_pixels": 9}
PRUNED |= {"decoding": DECODED}
UNDECODED = [
    ({"decoding": {"transparency": "black"}}, "decoding: transparency must be one of ignored, white, got 'black'"),
    ({"decoding": {"max_pixels": 0}}, "decoding: max_pixels must be from 1 to 89478485, got 0"),
]
TRAINED = {"model_config": MODEL, "betas": [0.9, 0.98]}
ONE_VALUE_REFUSED = {
    name: {bool: not GeneralLoader.__dict__[name], str: "text"}.get(type(GeneralLoader.__dict__[name]), 1)
    for name in ONE_VALUE
}


TUNED = {
    "model_config": MODEL,
    "weights": "random",
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.98]},
    "scheduler": {"epochs": 1},
    "batch_size_train": 2,
    "batch_size_target": 4,
    "wandb_data": {"project": "a", "tags": ["b"]},
    "decoding": DECODED,
}
TUNED_REFUSED = [
    *UNDECODED,
    ({"optimizer": {"lr": 1e-3, "opt": "adam"}}, "optimizer: opt must be one of adamW, sgd, got 'adam'"),
    ({"optimizer": {"lr": 1e-3, "betas": [0.9]}}, "optimizer: betas must be two numbers"),
    ({"optimizer": {"lr": 1e-3, "min_lr": 1e-2}}, "optimizer: min_lr must be at most lr"),
    ({"scheduler": {"epochs": 1, "sched": "step"}}, "scheduler: sched must be one of linear, cosine, got 'step'"),
    ({"scheduler": {"epochs": 1, "num_warmup_steps": 1000}}, "scheduler: num_warmup_steps is a share"),
    ({"max_skipped": 1.5}, "max_skipped must be a fraction between 0 and 1, got 1.5"),
    ({"batch_size_target": 3}, "batch_size_target 3 is no multiple of batch_size_train 2 x 1 device"),
]
FOREIGN = ["--model", "hf:absent"]
FOREIGN_TUNED = {name: value for name, value in TUNED.items() if name != "model_config"}
FOREIGN_REFUSED = [
    ({"scheduler": {"epochs": 1, "sched": "step"}}, "scheduler: sched must be one of linear, cosine, got 'step'"),
    ({"max_skipped": 1.5}, "max_skipped must be a fraction between 0 and 1, got 1.5"),
]
SCENES = {"val_scenes": 1, "test_scenes": 1, "test": ["scenes"]}
SMOOTHING = ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1, got 1.0")


class Schema(NamedTuple):
    """How a dataclass is read: by which script with which options; a valid content with all that is nested; and changes
    of it that it must refuse beside those that its types tell, with what is said of them.
    """

    script: str
    options: list[str]
    content: dict[str, Any]
    refused: list[tuple[dict[str, Any], str]]


SCHEMAS = {
    PRUNE_CONFIGS["pairs"]: Schema(
        "prune",
        [],
        PRUNED | {"general": [FILES], "region": [FILES], "evaluation": {"k_test": 1, "files": FILES, "limit": 3}},
        [
            *UNDECODED,
            ({"max_skipped": 1.5}, "max_skipped must be a fraction between 0 and 1, got 1.5"),
            ({"bundled": True}, "set bundled: true, or give general and region files, not both"),
            ({"general": [{}]}, "general[0]: images must name a folder"),
            (
                {"general": [{"annotations": "a.json", "images": "{0..3}.tar"}]},
                "general[0]: images {0..3}.tar are shards",
            ),
            ({"general": [{"images": "a", "roots": {"b": "c"}}]}, "general[0]: roots are for annotation files"),
            ({"region": [{"images": "0.tar"}]}, "region files must name annotations"),
            (
                {"evaluation": {"bundled_split": "scene"}},
                "evaluation: bundled_split must be one of scenes, unseen_scenes",
            ),
            (
                {"evaluation": {"bundled_scenes": 3, "files": FILES}},
                "evaluation: set bundled_scenes or files, not both",
            ),
            ({"evaluation": {"files": {"images": "0.tar"}}}, "evaluation: files must name annotations"),
            ({"general_loader": "README.md"}, "README.md: not valid YAML"),
        ],
    ),
    PRUNE_CONFIGS["labels"]: Schema(
        "prune",
        ["-m", "dino"],
        PRUNED | {"images": IMAGES, "evaluation": {"images": IMAGES}},
        [
            ({"images": IMAGES | {"dataset": "imagnet"}}, "images: dataset must be one of imagenet, flowers102"),
            ({"evaluation": {"bundled_split": "all"}}, "evaluation: bundled_split must be unseen or seen, got 'all'"),
            ({"evaluation": {"bundled_images": 3, "images": IMAGES}}, "evaluation: set bundled_images or images"),
            ({"bundled": True}, "set bundled: true, or give images, not both"),
        ],
    ),
    PRUNE_CONFIGS["noise"]: Schema(
        "prune",
        ["-m", "dit"],
        PRUNED | {"evaluation": {"steps": 2}},
        [
            ({"bundled": True, "latents": "a.safetensors"}, "set bundled: true, or give latents, not both"),
            ({"evaluation": {"steps": 1}}, "evaluation: steps must be at least 2, got 1"),
        ],
    ),
    PRUNE_CONFIGS["external"]: Schema(
        "prune",
        ["-m", "timm:resnet18"],
        {"weights": "random", "include": ["*"], "groups": {"all": ["*"]}},
        [
            *(({"loss": text}, "loss must be package.module:function") for text in ("a.b", "a b:c")),
            ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'float8'"),
            ({"calibrate_on": "audio"}, "calibrate_on must be one of all, text, vision, got 'audio'"),
        ],
    ),
    PRETRAIN_CONFIGS["pairs"]: Schema(
        "pretrain",
        [],
        TRAINED | {"stages": [STAGE]},
        [
            ({"stages": []}, "stages must have at least one stage"),
            ({"stages": [STAGE | {"objectives": []}]}, "stages[0]: objectives must name at least one loss"),
            ({"optimizer": "sgd"}, "optimizer must be adamw or muon, got 'sgd'"),
            *(({"betas": betas}, "betas must be two numbers") for betas in ([0.9], [0.9, 1.0], [0.9, 0.9, 0.9])),
        ],
    ),
    PRETRAIN_CONFIGS["labels"]: Schema(
        "pretrain",
        ["-m", "dino"],
        TRAINED | {"stages": [{"steps": 1, "batch_size": 2}]},
        [
            ({"stages": []}, "stages must have at least one stage"),
            ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1"),
        ],
    ),
    PRETRAIN_CONFIGS["noise"]: Schema(
        "pretrain",
        ["-m", "dit"],
        TRAINED | {"steps": 1},
        [
            ({"decay": 1.0}, "decay must be from 0 to below 1, got 1.0"),
            ({"sampling_steps": 1}, "sampling_steps must be at least 2, got 1"),
        ],
    ),
    RetrievalConfig: Schema(
        "retrieval",
        [],
        TUNED | {"bundled": SCENES | {"train_scenes": 4}},
        [
            *TUNED_REFUSED,
            ({"train_file": ["a.json"]}, "set bundled, or train_file, val_file, test_file and image_root, not both"),
            ({"bundled": None}, "no data: set train_file, or bundled"),
            ({"bundled": SCENES | {"train_scenes": 4, "test": ["all"]}}, "bundled: bundled.test must be of scenes"),
        ],
    ),
    CaptioningConfig: Schema(
        "captioning",
        [],
        TUNED | {"bundled": SCENES | {"train_scenes": 4}},
        [
            SMOOTHING,
            ({"max_length": 4}, "max_length must be at least 5"),
            ({"bundled": None}, "no data: set train_file"),
        ],
    ),
    CaptioningPretrainConfig: Schema(
        "captioning_pretrain",
        [],
        TUNED | {"bundled": {"train_scenes": 4}},
        [
            SMOOTHING,
            ({"train": [FILES]}, "set bundled or train, not both"),
            ({"bundled": None}, "no data: set train, or bundled"),
            ({"bundled": None, "train": [{}]}, "train[0]: images must name a folder"),
        ],
    ),
    VQAConfig: Schema(
        "vqa",
        [],
        TUNED | {"bundled": SCENES | {"train_questions": 4}},
        [
            ({"answer_list": "a.json"}, "set bundled, or train_file, val_file, test_file and answer_list, not both"),
            ({"bundled": None}, "no data: set train_file, or bundled"),
        ],
    ),
    ClassificationConfig: Schema(
        "image_classification",
        [],
        TUNED | {"bundled": {"train_images": 2}},
        [
            SMOOTHING,
            ({"dataset": "cifar"}, "dataset must be one of bundled, cifar10"),
            ({"max_tokens": 3}, "max_tokens is for models of texts"),
            ({"bundled": {"test": ["all"]}}, "bundled: bundled.test must be of seen, unseen, got 'all'"),
        ],
    ),
    ForeignRetrievalConfig: Schema("retrieval", FOREIGN, FOREIGN_TUNED, FOREIGN_REFUSED),
    ForeignCaptioningConfig: Schema(
        "captioning", FOREIGN, FOREIGN_TUNED, [*FOREIGN_REFUSED, ({"max_length": 0}, "max_length must be at least 1")]
    ),
    ForeignVQAConfig: Schema("vqa", FOREIGN, FOREIGN_TUNED, FOREIGN_REFUSED),
    ForeignClassificationConfig: Schema(
        "image_classification", FOREIGN, FOREIGN_TUNED | {"dataset": "cifar10"}, [*FOREIGN_REFUSED, SMOOTHING]
    ),
    GeneralLoader: Schema(
        "prune",
        [],
        {"cc3m_file": "a.json", "region_files": ["r.json"], "batch_size": 1},
        [
            *(({name: value}, f"{name} is always ") for name, value in ONE_VALUE_REFUSED.items()),
            ({"root": "data/imagenet"}, "set root, for models that classify, or files of image-text pairs, not both"),
            ({"cc3m_file": "", "region_files": []}, "names no data for this kind of model"),
        ],
    ),
}

WRONG = {
    int: (1.5, "two", True, math.nan, [1], {"a": 1}, None),
    float: ("fast", True, math.nan, math.inf, [1.0], {"a": 1}, None),
    str: (3, 1.5, True, ["x"], {"a": "b"}, None),
    bool: (1, 0, "yes", "true", [], None),
}


def wrong(kind: Any) -> Iterator[Any]:
    """Values that a field with this annotation must not have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        yield from (value for value in wrong(inner) if value is not None)
    elif dataclasses.is_dataclass(kind):
        yield from (3, "text", [1], None)
    elif origin in (list, tuple):
        yield from (3, "text", {"a": 1}, None, *([value] for value in wrong(arguments[0])))
    elif origin is dict:
        yield from (3, "text", [1], None, *({"a": value} for value in wrong(arguments[1])))
    else:
        yield from WRONG.get(kind, ())  # Any: nothing is wrong


def example(kind: Any) -> Any:
    """A value with this annotation; of a dataclass, what it needs."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        kinds, missing = typing.get_type_hints(kind), dataclasses.MISSING
        return {
            f.name: example(kinds[f.name])
            for f in dataclasses.fields(kind)
            if f.default is f.default_factory is missing
        }
    if origin in (list, tuple):
        return [example(arguments[0])]
    return {int: 2, float: 0.5, str: "a", bool: False}.get(kind)


def spoilt(schema: type, content: dict) -> Iterator[tuple[str, dict]]:
    """(what the message names, content with one fault): wrong types and numbers below zero in every field, unknown keys
    one letter off, required ones left out; the same inside what is nested.
    """
    kinds = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        kind, required = kinds[f.name], f.default is f.default_factory is dataclasses.MISSING
        for value in wrong(kind):
            yield f.name, content | {f.name: value}
        if {kind, *typing.get_args(kind)} & {int, float}:
            yield f.name, content | {f.name: [-1.0, -1.0] if typing.get_origin(kind) is tuple else -1}
        if required:
            yield f"key '{f.name}' is missing", {key: value for key, value in content.items() if key != f.name}
        else:
            yield f"unknown key '{misspelt(f.name)}'; did you mean '", content | {misspelt(f.name): 1}
        inner = next((k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)), None)
        present = content.get(f.name)
        if inner:
            listed = kind is not inner and typing.get_origin(kind) in (list, tuple)
            present = present or ([example(inner)] if listed else example(inner))
            for told, changed in spoilt(inner, present[0] if listed else present):
                yield told, content | {f.name: [changed] if listed else changed}


def bad_configurations(schema: type) -> Iterator[Case]:
    script, more, content, refused = SCHEMAS[schema]
    arguments = [*RUNS[script], "--config", "TMP/c.yaml", *more]
    outer = PRUNED | {"general_loader": "TMP/g.yaml"}
    for told, bad in [*spoilt(schema, content), *((told, content | change) for change, told in refused)]:
        if schema is GeneralLoader:
            yield Case(script, arguments, ["TMP/c.yaml: TMP/g.yaml: ", told], {"c.yaml": outer, "g.yaml": bad})
        else:
            yield Case(script, arguments, ["TMP/c.yaml: ", told], {"c.yaml": bad})


ARGUMENTS = [case for script in RUNS | PARSED for case in bad_arguments(script)]
CONFIGURATIONS = [case for schema in SCHEMAS for case in bad_configurations(schema)]
TOGETHER = [  # arguments that are good by themselves
    *(Case(script, tuning(script)[:-2], ["give --mask FILE to train a pruned model, or --dense"]) for script in TUNING),
    *(
        Case(
            script,
            [*tuning(script), "-d", "3"],
            ["batch_size_target 8 is no multiple of batch_size_train 4 x 3 devices"],
        )
        for script in TUNING
    ),
    Case("retrieval", [*tuning("retrieval"), "--model", "dino"], ["there is no retrieval with the model 'dino'"]),
    Case("vqa", [*tuning("vqa"), "--model", "dino"], ["there is no vqa with the model 'dino'"]),
    Case("captioning_pretrain", [*tuning("captioning_pretrain"), "--model", "blip"], ["there is with: xvlm"]),
    Case("captioning", [*tuning("captioning"), "--load_capt_pretrain"], ["needs --pretraining_weights: last.pt"]),
    Case("captioning", [*tuning("captioning"), "--load_capt_pretrain", "--model", "blip"], ["there is with: xvlm"]),
    Case(
        "image_classification",
        [*tuning("image_classification"), "--batch_size", "5", "-d", "2"],
        ["--batch_size 5 is no multiple of 2 devices"],
    ),
    Case(
        "image_classification", [*tuning("image_classification"), "--dataset", "flowers102"], ["metadata.csv: file not"]
    ),
]
BAD_YAML = [  # whole files
    Case(script, [*RUNS[script], "--config", "TMP/c.yaml"], ["TMP/c.yaml: ", told], {"c.yaml": text})
    for script in RUNS
    for text, told in {
        "{weights: random": "not valid YAML",
        "[1, 2]": "expected a mapping",
        "text": "expected a mapping",
        "weights: *nothing": "not valid YAML",
        "weights: !!python/object/apply:os.system [true]": "not valid YAML",
        "": "key 'model_config' is missing",
    }.items()
]

SEED = 0  # of the sample of cases

DRIVER = """
import contextlib, importlib, io, json, logging, os, sys
from pathlib import Path
from engine.launch import run

def names(folder):
    return {str(path) for path in Path(folder).rglob("*")}

for number, (script, arguments, files) in enumerate(json.load(sys.stdin)):
    folder, out, err, code = f"{sys.argv[1]}/{number}", io.StringIO(), io.StringIO(), None
    os.mkdir(folder)
    for name, content in files.items():
        Path(folder, name).write_text(content.replace("TMP", folder))
    before = names(folder)
    arguments = [argument.replace("TMP", folder) for argument in arguments]
    logging.getLogger().handlers.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(lambda: importlib.import_module(script).main(arguments))
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    written = sorted(names(folder) - before)
    print(json.dumps([code, out.getvalue(), err.getvalue().replace(folder, "TMP"), written]))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture(scope="module", params=["sample", pytest.param("all", marks=pytest.mark.slow)])
def outcomes(request, tmp_path_factory):
    """Case -> (exit code, stdout, stderr, files written), from one process in which torch is missing; of a sample of
    the cases where it is not to be slow, the same in every run.
    """
    blocked, folder = tmp_path_factory.mktemp("blocked"), tmp_path_factory.mktemp("cases")
    for name in HEAVY:
        (blocked / f"{name}.py").write_text("raise ImportError('too early')")
    cases = [*ARGUMENTS, *CONFIGURATIONS, *TOGETHER, *BAD_YAML]
    if request.param == "sample":
        cases = random.Random(SEED).sample(cases, len(cases) // 5)
    files = [{n: c if isinstance(c, str) else yaml.safe_dump(c) for n, c in case.files.items()} for case in cases]
    given = json.dumps([[case.script, case.arguments, file] for case, file in zip(cases, files, strict=True)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path.cwd()), str(blocked)))}
    command = [sys.executable, "-c", DRIVER, str(folder)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    *lines, modules = done.stdout.splitlines()
    assert not set(json.loads(modules)) & set(HEAVY)
    return {case.name: json.loads(line) for case, line in zip(cases, lines, strict=True)}


def check(outcomes: dict, cases: list[Case]) -> None:
    """All end with exit code 2, one line that tells what is wrong, and nothing written."""
    found = []
    for case in (case for case in cases if case.name in outcomes):
        code, out, err, written = outcomes[case.name]
        lines = re.findall(r"(?m)^error: .+$", err)
        one_line = len(lines) == 1 and "Traceback" not in err and all(part in lines[0] for part in case.told)
        if code != 2 or out or written or not one_line:
            found.append(f"{case.name}: expected {case.told}, got {code} {out}{err}{written}")
    assert not found, "\n".join([f"{len(found)} of {len(cases)}", *found])


@pytest.mark.parametrize("script", RUNS | PARSED)
def test_bad_arguments(outcomes, script):
    cases = [case for case in ARGUMENTS if case.script == script]
    assert len(cases) > (20 if script in RUNS else 5)
    check(outcomes, cases)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_bad_configurations(outcomes, schema):
    cases = list(bad_configurations(schema))
    assert len(cases) > 30
    check(outcomes, cases)


def test_arguments_that_do_not_go_together(outcomes):
    check(outcomes, TOGETHER)


def test_files_that_are_no_configuration(outcomes):
    check(outcomes, BAD_YAML)


def test_every_option_of_a_text_has_bad_values():
    known = {action.dest for script in RUNS for action in parser_of(script)._actions}
    assert set(BAD_VALUES) <= known, "an option that is gone"
    for script in RUNS:
        for action in (a for a in parser_of(script)._actions if a.nargs != 0 and a.dest != "help"):
            assert list(bad_values(action)) or action.dest in BAD_VALUES, f"{script}.py {action.dest}: give bad values"


def test_every_configuration_is_here():
    def leaves(kind: type) -> set[type]:
        return set().union(*map(leaves, kind.__subclasses__())) if kind.__subclasses__() else {kind}

    found = set().union(*map(leaves, (PrunedModel, TrainingConfig, TaskConfig)))
    assert {kind for kind in found if kind.__module__.startswith("configs.")} | {GeneralLoader} <= set(SCHEMAS)


# What is known only after torch is there: sizes of models, weights, data


def refused(capsys, main: Callable[[], Any]) -> str:
    """The one line on stderr of what ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        run(main)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "", err
    return error_line(err)


SIZES = {  # model -> its dataclass, a configuration, and changes that it must refuse beside wrong types
    "xvlm": (xvlm.Config, CONFIGS / "model.yaml", {"text": {"dropout": 1.0, "heads": 0}, "vision": {"patch_size": 0}}),
    "blip": (blip.Config, Path("configs/blip/model_mini.yaml"), {"vision": {"drop_path": 1.5, "heads": 0}}),
    "dino": (dino.Config, Path("configs/dino/model_mini.yaml"), {"patch_size": 0, "heads": 0, "classes": 1}),
    "dit": (dit.Config, Path("configs/dit/model_mini.yaml"), {"width": 3, "schedule": "none", "prediction": "none"}),
}


@pytest.mark.parametrize("name", SIZES)
def test_bad_sizes_of_models(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("prune.launch", lambda *_: pytest.fail("too late"))
    schema, path, changes = SIZES[name]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(PRUNED | {"model_config": str(tmp_path / "m.yaml")}))
    arguments = ["-m", name, "-p", "omp", "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "out")]
    content = yaml.safe_load(path.read_text())
    bad = list(spoilt(schema, content))
    for key, value in changes.items():
        inner = value if isinstance(value, dict) else {key: value}
        for changed, wrong_one in inner.items():
            within = {key: content[key] | {changed: wrong_one}} if isinstance(value, dict) else {changed: wrong_one}
            bad.append((changed, content | within))
    for told, changed in bad:
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(changed))
        line = refused(capsys, lambda: prune.main(arguments))
        assert f"{tmp_path}/m.yaml: " in line and told in line
    assert {entry.name for entry in tmp_path.iterdir()} == {"c.yaml", "m.yaml"}


GOOD = {  # kind of annotation file -> a record
    "pairs": {"image": "1.png", "caption": ["a", "b"], "dataset": "cc3m", "bb": [[0, 0, 4, 4], [2, 2, 4, 4]]},
    "regions": {"image": "1.png", "caption": "a", "elems": [{"bb": [0, 0, 9, 9], "caption": "b", "attributes": "c"}]},
    "evaluation": {"image": "1.png", "caption": ["a", "b"]},
}
NEEDED = {"pairs": ("image", "caption"), "regions": ("image", "elems"), "evaluation": ("image", "caption")}


def bad_records(kind: str) -> Iterator[tuple[str, Any]]:
    """(what the message says, a record)."""
    good = GOOD[kind]
    yield from (("expected {", record) for record in (3, "text", None, [good], []))
    for key in NEEDED[kind]:
        yield f"'{key}'", {name: value for name, value in good.items() if name != key}
        yield from ((f"'{key}'", good | {key: value}) for value in (None, 3, {"a": 1}, [3], [None]))
    if kind == "pairs":
        yield from (
            ("'bb'", good | {"bb": value}) for value in (3, "0,0,4,4", [1, 2, 3], [[0, 0, 4]], [good["bb"][0]] * 3)
        )
    if kind == "regions":
        (elem,) = good["elems"]
        changes = [("bb", value) for value in (None, 3, [1, 2, 3], ["a", 0, 1, 1], [math.inf, 0, 1, 1])]
        changes += [("caption", value) for value in (None, 3, [], [3])] + [("attributes", 3)]
        yield from ((f"'{key}'", good | {"elems": [elem | {key: value}]}) for key, value in changes)


def bad_contents(kind: str) -> Iterator[tuple[str, str]]:
    """(what the message says, content of an annotation file): at record 1 of 3 where it has some."""
    for told, record in bad_records(kind):
        yield (
            f"record 1: {told}" if isinstance(record, dict) else "record 1 is ",
            json.dumps([GOOD[kind], record, GOOD[kind]]),
        )
    yield from (("not a JSON file", content) for content in ("", "{", "text", "[1,]", "\x00", json.dumps([1])[:-1]))
    yield from (("expected a JSON list", json.dumps(content)) for content in ({"images": []}, 3, "text", None))
    yield "no record in this file", "[]"


@pytest.fixture
def read(tmp_path):
    """Opens an annotation file and a folder as calibration or evaluation does."""
    tokenizer = WordPiece("data/vocab/mini_vocab.txt")
    encode, vision = TextEncoder(tokenizer, 12), SimpleNamespace(image_size=16, patch_size=8)

    def read(kind: str, files: Files) -> None:
        if kind == "evaluation":
            RetrievalEvalDataset(files.annotations, files.images, EvalTransform(16))
        else:
            config = PruneConfig("m.yaml", "random", **{"general" if kind == "pairs" else "region": [files]})
            Calibration(config, encode, vision, tmp_path / "out", 2, seed=0)

    return read


@pytest.mark.parametrize("kind", GOOD)
def test_bad_annotation_files(tmp_path, capsys, read, kind):
    (tmp_path / "images").mkdir()
    files = Files(str(tmp_path / "a.json"), str(tmp_path / "images"))
    for told, content in bad_contents(kind):
        (tmp_path / "a.json").write_text(content)
        line = refused(capsys, lambda: read(kind, files))
        assert f"{tmp_path}/a.json: {told.partition(': ')[0]}" in line and told.partition(": ")[2] in line, (
            content,
            line,
        )
    (tmp_path / "a.json").write_bytes(b"\xff\xfe[]")
    assert "a.json: not a JSON file" in refused(capsys, lambda: read(kind, files))
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.json", "images"}


@pytest.mark.parametrize("kind", GOOD)
def test_images_and_files_that_are_not_there(tmp_path, capsys, read, kind):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([GOOD[kind]] * 3))
    for annotations, images, told in (
        ("none.json", "images", "none.json: annotation file not found"),
        ("images", "images", "images: annotation file not found"),
        ("a.json", "nowhere", "nowhere: image folder not found"),
        ("a.json", "a.json", "a.json: image folder not found"),
        ("a.json", "images", "images: none of 3 images of"),
    ):
        files = Files(str(tmp_path / annotations), str(tmp_path / images))
        assert f"{tmp_path}/{told}" in refused(capsys, lambda files=files: read(kind, files))
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.json", "images"}
