"""Classifiers of timm with their data configuration, as the scripts on them need both."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import AVERAGED, TIMM, WRAPPERS, half_dtypes, load_weights, read_weights
from models.external.model import timm_model
from sparsity.errors import UserError, listed

POSITIONS = ("pos_embed",)  # interpolated where a checkpoint has another image size


def build(
    name: str,
    *,
    pretrained: bool,
    num_classes: int | None = None,
    image_size: int | None = None,
    drop_path: float | None = None,
    way_out: str = "",
) -> nn.Module:
    """A model of timm, or `vit_mini`, in float32 and evaluation mode.

    pretrained: with the published weights, else random ones. num_classes, image_size, drop_path (a rate): default, the
    model's own. way_out: what to do where the weights are not to be had. UserError as
    `models.external.model.timm_model`.
    """
    options = {"num_classes": num_classes, "img_size": image_size, "drop_path_rate": drop_path}
    options = {key: value for key, value in options.items() if value is not None}
    return timm_model(name, pretrained, option="--model ", way_out=way_out, **options).float().eval()


def data_config(model: nn.Module, image_size: int | None = None) -> dict[str, Any]:
    """Return what timm says of a model's images: input_size, interpolation, mean, std, crop_pct."""
    from timm.data import resolve_data_config

    return resolve_data_config({} if image_size is None else {"img_size": image_size}, model=model)


def transform(config: dict[str, Any]) -> Any:
    """RGB image -> normalised (3, H, W), as timm evaluates."""
    from timm.data import create_transform

    return create_transform(**config, is_training=False)


def read(path: Path, *, ema: bool | None = None, key: str = "") -> dict[str, Tensor]:
    """Read the weights in a checkpoint of timm or of this project.

    ema: the averaged weights, or the raw ones; by default as `timm.create_model` reads it: averaged where there are
    any. key: under which they stand, whatever it is. UserError where it has none.
    """
    return read_weights(path, TIMM if ema is None else AVERAGED if ema else WRAPPERS, key)


def load(
    model: nn.Module, path: Path, weights: dict[str, Tensor] | None = None, *, key: str = ""
) -> dict[str, torch.dtype]:
    """The weights of a checkpoint into a model; returns the dtypes of those in half precision.

    weights: those of the file, where they are not as `read` finds them. key: of `read`. Raises UserError where it is
    one of another model, of other classes, or of float64, in which nothing computes here.
    """
    weights = read(path, key=key) if weights is None else weights
    wide = [name for name, tensor in weights.items() if tensor.dtype == torch.float64]
    if wide:
        raise UserError(
            f"{path}: {len(wide)} tensors are of float64, and would be computed with and written in float32: "
            f"{listed(wide)}; round them first (python pack.py {path} FILE.safetensors --dtype float32), or prune them "
            "as they are with prune.py -m timm:NAME --weights FILE"
        )
    heads = [name for name, module in model.named_modules() if module is model.get_classifier()]
    for head in heads:
        own, found = dict(model.named_parameters()).get(f"{head}.weight"), weights.get(f"{head}.weight")
        if own is not None and found is not None and len(own) != len(found):
            raise UserError(
                f"{path}: has {len(found)} classes, and the model {len(own)}: give --num-classes {len(found)}"
            )
    load_weights(model, path, positions=POSITIONS, weights=weights)
    return half_dtypes(weights)
