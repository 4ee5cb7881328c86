"""Plans on an accelerator against the same plans on the CPU: masks, updated weights, the model untouched, and few
launches.
"""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.profiler import ProfilerActivity, profile

import pruners
from models.external.model import prunable_view
from sparsity.errors import UserError
from sparsity.statistics.passes import collect
from sparsity.view import PrunableView

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")]
PLANS = [
    *((name, {}) for name in pruners.available()),
    ("wanda", {"calibration_mode": "sequential", "pool": "row"}),
    ("wanda", {"offload": True}),
    ("sparsegpt", {"enable_update": True}),
    ("sparsegpt", {"pool": "global", "calibration_mode": "dense"}),
    ("magnitude", {"reconstruct": "lsq"}),
    ("wanda", {"reconstruct": "alps", "allocation": "owl"}),
    ("multiflow", {"reconstruct": "admm"}),
    ("snip", {"epochs": 3}),
]


def made(device: str, dtype: torch.dtype = torch.float32) -> tuple[PrunableView, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=10).eval()
    model.to(device, dtype)
    view = prunable_view(model)
    view.loss = lambda batch, generator: model(batch).square().mean()  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(1)
    return view, [torch.randn(4, 3, 32, 32, generator=generator).to(device, dtype) for _ in range(3)]


def pruned(name: str, options: dict, device: str, **target):
    view, batches = made(device)
    before = copy.deepcopy(view.model.state_dict())
    masks = pruners.prune(view, name, data=batches, **target, **options)
    assert all(torch.equal(value, before[key]) for key, value in view.model.state_dict().items())
    return masks


@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize(("name", "options"), PLANS, ids=str)
def test_plans_agree_with_the_cpu(name, options, target):
    try:
        expected = pruned(name, options, "cpu", **target)
    except UserError as error:  # a combination that is refused is so on both
        with pytest.raises(UserError, match=str(error)[:20]):
            pruned(name, options, "cuda", **target)
        return
    found = pruned(name, options, "cuda", **target)
    assert found.total - found.kept == expected.total - expected.kept
    same = sum(int((found[layer] == mask).sum()) for layer, mask in expected.items())
    # Sums of another order: near ties fall otherwise, and rounds and steps build on what fell before them.
    builds_on = {"admm", "alps"} & {name, options.get("reconstruct")} or "epochs" in options
    assert same >= (0.95 if builds_on else 0.995) * expected.total
    assert found.weights.keys() == expected.weights.keys()
    for layer, weight in found.weights.items():
        assert not weight[~found[layer]].any() and weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "snip", "magnitude"])
def test_half_precision(name, dtype):
    view, batches = made("cuda", dtype)
    before = copy.deepcopy(view.model.state_dict())
    masks = pruners.prune(view, name, sparsity=0.5, data=batches)
    assert masks.total - masks.kept == pytest.approx(masks.total / 2, abs=len(masks) * 512)
    assert all(torch.equal(value, before[key]) for key, value in view.model.state_dict().items())


def test_statistics_take_few_launches():
    """A few for each input, whatever its width."""
    launches = []
    for width in (64, 256):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width)).cuda()
        view = PrunableView(model, group_of=lambda name: "all", forward=model)
        batch = torch.randn(128, width, device="cuda")
        collect(view, "input_norms", [batch])
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            collect(view, "input_norms", [batch])
        launches.append(sum(event.count for event in recorded.key_averages() if event.key == "cudaLaunchKernel"))
    assert max(launches) < 60
