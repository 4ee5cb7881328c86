"""nn.MultiheadAttention is pruned like the same attention made of linear layers."""

import pytest
import torch
from torch import nn

import pruners
from models.external import model as external
from sparsity.errors import UserError
from sparsity.learned.learnable_masks import LearnableMasks
from sparsity.pattern import parse_pattern
from sparsity.statistics.inputs import Statistics
from sparsity.view import PrunableView

WIDTH, HEADS = 16, 4


class Taken(nn.Module):
    """The same attention, of linear layers."""

    def __init__(self, attention):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.qkv.weight.copy_(attention.in_proj_weight)
            self.qkv.bias.copy_(attention.in_proj_bias)
            self.out.weight.copy_(attention.out_proj.weight)
            self.out.bias.copy_(attention.out_proj.bias)

    def forward(self, x, mask=None):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Own(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.attention.in_proj_bias.data.normal_()
        self.first = batch_first

    def forward(self, x, mask=None):
        x = x if self.first else x.transpose(0, 1)
        output, _ = self.attention(x, x, value=x, attn_mask=mask, need_weights=False)
        return output if self.first else output.transpose(0, 1)


def views(batch_first=True):
    torch.manual_seed(0)
    own = Own(batch_first).eval()
    taken = Taken(own.attention).eval()
    return tuple(PrunableView(m, group_of=lambda key: "all", forward=lambda b, m=m: m(*b)) for m in (own, taken))


NAMES = {"attention.in_proj_weight": "qkv.weight", "attention.out_proj.weight": "out.weight"}
CAUSAL = torch.ones(6, 6).tril().bool()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_what_its_projections_read(batch_first, masked):
    own, taken = views(batch_first)
    x = torch.randn(3, 6, WIDTH)
    found = []
    for view, mask in ((own, ~CAUSAL), (taken, CAUSAL)):  # True: not looked at, or looked at
        with Statistics(view, "gram") as statistics:
            statistics.add((x, mask) if masked else (x,))
        found.append(statistics.result())
        assert set(statistics.tokens.values()) == {18} and set(statistics.samples.values()) == {3}
    for name, other in NAMES.items():
        torch.testing.assert_close(found[0][name], found[1][other], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruner", ["omp", "wanda", "sparsegpt"])
def test_the_same_masks(pruner):
    own, taken = views()
    batches = [(torch.randn(4, 6, WIDTH),) for _ in range(3)]
    before = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    ((_, ours),), ((_, theirs),) = (pruners.build(pruner).prune(view, batches, [0.5]) for view in (own, taken))
    assert list(ours) == list(NAMES)
    for name, other in NAMES.items():
        assert (ours[name] == theirs[other]).float().mean() > 0.99, "but for what rounding turns around"
    with ours.applied(own):
        assert not own.model.state_dict()["attention.in_proj_weight"][~ours["attention.in_proj_weight"]].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.model.state_dict().items())


def test_transformer_layers_of_torch_are_pruned_whole():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    view, batches = external.prunable_view(model), [(torch.randn(4, 6, WIDTH),) for _ in range(2)]
    assert len(view.weights) == 8
    for name in ("wanda", "sparsegpt"):
        ((_, masks),) = pruners.build(name).prune(view, batches, None, pattern=parse_pattern("2:4"))
        assert masks.total - masks.kept == masks.total // 2


def test_what_cannot_be_is_said():
    torch.manual_seed(0)

    def view(module, forward, **options):
        return PrunableView(module, group_of=lambda key: "all", forward=forward, **options)

    cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    batches = [(torch.randn(2, 3, WIDTH), torch.randn(2, 5, WIDTH))]
    with pytest.raises(UserError, match="makes queries and keys of different inputs"):
        list(pruners.build("wanda").prune(view(cross, lambda b: cross(b[0], b[1], b[1])), batches, [0.5]))
    other = nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, HEADS, kdim=8), "b": nn.Linear(4, 4)})
    with pytest.raises(UserError, match="'a' cannot be pruned: an nn.MultiheadAttention whose keys"):
        view(other, None)
    assert list(view(other, None, keep_dense=["a"]).weights) == ["b.weight"]
    kept = view(nn.ModuleDict({"a": cross}), None, keep_dense=["a.out_proj"])
    assert list(kept.weights) == ["a.in_proj_weight"] and kept.dense == ("a.out_proj.weight",)
    with pytest.raises(UserError, match="'.*in_proj_weight' of an nn.MultiheadAttention cannot learn"):
        LearnableMasks(view(cross, None), parse_pattern("2:4"))
