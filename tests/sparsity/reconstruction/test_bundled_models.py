"""ALPS against SparseGPT on every layer of the bundled models, on inputs of the dense model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

from configs.loading import load_config
from configs.pruning import PruneConfig
from datasets.bundled.classification import BundledClassification
from datasets.bundled.glyphs import load_glyphs
from datasets.calibration.data_kinds import Calibration
from datasets.text import TextEncoder
from models import external
from models.dino import timm_mini as registered  # noqa: F401 (makes vit_mini known to timm)
from models.xvlm import model as xvlm
from sparsity.pattern import NM
from sparsity.reconstruction.alps import ALPS
from sparsity.reconstruction.base import Problem
from sparsity.reconstruction.equations import relative_error
from sparsity.reconstruction.lsq import LeastSquares
from sparsity.reconstruction.sparsegpt import SparseGPT
from sparsity.statistics.passes import collect

pytestmark = pytest.mark.slow


def vit_mini(folder: Path):
    """Return the bundled classifier's view, and its batches."""
    data = BundledClassification(load_glyphs(), "seen", 128, side=72)
    images = torch.stack([data[n]["image"] for n in range(128)])
    return external.prunable_view(timm.create_model("vit_mini", pretrained=True).eval()), images.split(32)


def xvlm_mini(folder: Path):
    """Return the view of the bundled model of images and texts, and its batches."""
    config = load_config(Path("configs/xvlm/prune_mini.yaml"), PruneConfig)
    sizes = load_config(config.model_config, xvlm.Config)
    encode = TextEncoder(xvlm.tokenizer(sizes), sizes.max_tokens, **xvlm.TEXT)
    batches = Calibration(config, encode, sizes.vision, folder, 24, 0, regions=xvlm.REGIONS)
    return xvlm.prunable_view(xvlm.build(sizes, config.checkpoint).eval()), list(batches)


def problems(view, batches, **target) -> Iterator[Problem]:
    """Yield the problem of each layer."""
    for name, hessian in collect(view, "hessian", batches).items():
        yield Problem(name, view.weights[name].matrix(), {"hessian": hessian}, **target)


@pytest.mark.parametrize("target", [{"pattern": NM(2, 4)}, {"sparsity": "0.7", "scope": "block"}], ids=str)
@pytest.mark.parametrize("model", [vit_mini, xvlm_mini])
def test_alps_loses_less_than_sparsegpt(model, target, tmp_path):
    view, batches = model(tmp_path)
    better, same_mask, layers = 0, 0, 0
    for problem in problems(view, batches, **target):
        kept, swept = SparseGPT().solve(problem)
        given = Problem(problem.name, problem.weight, problem.statistics, kept)
        errors = [relative_error(problem, B, 0.01) for B in (swept, ALPS().solve(problem)[1])]
        better += errors[1] <= errors[0]
        same_mask += relative_error(problem, LeastSquares().solve(given)[1], 0.01) <= errors[0]
        layers += 1
    assert layers > 20 and better >= 0.95 * layers
    assert same_mask == layers  # on SparseGPT's own mask
