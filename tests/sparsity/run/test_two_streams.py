"""The dense model beside the pruned one: what is replayed equals running two models, to the bit."""

from collections.abc import Callable, Sequence
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

from models.blip import model as blip
from models.external.model import prunable_view
from models.xvlm import model as xvlm
from sparsity.errors import UserError
from sparsity.replay.replayed import Replayed
from sparsity.run.sequential import Blocks, PrunedStages, Solved, stages
from sparsity.statistics.hessian import gram
from sparsity.statistics.inputs import input_sums
from sparsity.statistics.passes import scaled
from sparsity.statistics.sums import add
from sparsity.view import PrunableView
from tests import tiny_models
from tests.sparsity.run import test_replay as single
from tests.sparsity.run.test_replay import WIDTH, Block, Opaque, Pair, Tied, Tower, chain, tower, wanda
from tests.toys import Ranks, view_of

pytestmark = pytest.mark.script  # long: left out of make test-fast

OF_BOTH = ["hessian", "input_means", "cross", "dense_hessian", "dense_means"]
batches = single.batches


def pairs(weight):
    return zip(weight.modules, weight.uses, strict=True)


def inputs_of(view: PrunableView, batch: object, names: Sequence[str]) -> list[tuple[str, str, Tensor]]:
    """(name, key, real tokens) of each call of these layers, by hooks of our own."""
    seen: list[tuple[str, str, Tensor]] = []

    def note(name: str, key: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            rows, valid = args[0].reshape(-1, args[0].shape[-1]), view.valid_tokens(key, batch)
            seen.append((name, key, (rows if valid is None else rows[valid.reshape(-1).bool()]).clone()))

        return hook

    uses = [(name, *use) for n in names for name, w in [(n, view.weights[n])] for use in pairs(w)]
    hooks = [module.register_forward_pre_hook(note(name, key)) for name, module, key in uses]
    with torch.no_grad():
        view.forward(batch)
    for hook in hooks:
        hook.remove()
    return seen


def two_models(
    view: PrunableView, put: PrunedStages, number: int, batches: Sequence, names: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """The statistics of these layers, when the model runs whole, once dense and once with the stages before pruned."""
    sums: dict[str, dict[str, Tensor]] = {
        kind: {} for kind in ("gram", "input_sums", "products", "dense_gram", "dense_sums")
    }
    tokens = dict.fromkeys(names, 0)
    for batch in batches:
        put(())
        dense = inputs_of(view, batch, names)
        put(range(number))
        for (name, key, rows), (*same, before) in zip(inputs_of(view, batch, names), dense, strict=True):
            assert [name, key] == same
            tokens[name] += len(rows)
            found = {"gram": gram(rows), "input_sums": input_sums(rows), "products": before.float().t() @ rows.float()}
            found |= {"dense_gram": gram(before), "dense_sums": input_sums(before)}
            for kind, value in found.items():
                add(sums[kind].setdefault(name, torch.zeros_like(value, dtype=torch.float64)), value)
    return scaled(sums, tokens, OF_BOTH)


def check(view: PrunableView, batches: Sequence, **options) -> None:
    """Each stage is measured with those before it pruned, and the model is left as it was."""
    before = {key: value.clone() for key, value in view.model.state_dict().items()}
    view.model.eval()
    view.forward(batches[0])  # transformers installs hooks of its own in the first pass
    done, differs = Blocks(view), 0
    with (
        Replayed(view, lambda: batches, stages(view), both=True, **options) as calls,
        PrunedStages(view, calls.order, done) as put,
    ):
        calls.put = put
        for number, names in enumerate(calls.order):
            found = calls.measure(names, [*OF_BOTH, "input_norms"])
            expected = two_models(view, put, number, batches, names)
            for statistic, values in expected.items():
                for name in names:
                    assert torch.equal(found[statistic][name], values[name]), (statistic, name)
                    differs += not torch.equal(found["input_means"][name], found["dense_means"][name])
            put(())
            norms = found["input_norms"]
            done.save(
                number, {n: Solved(*wanda(n, view.weights[n].matrix(), {"input_norms": norms[n]})) for n in names}
            )
    assert differs or len(calls.order) == 1
    assert all(torch.equal(value, before[key]) for key, value in view.model.state_dict().items())


@pytest.mark.parametrize("route", [r for r in single.ROUTES], ids=lambda route: route.__name__)
def test_equals_two_models(route, batches):
    check(tower(route), batches)


def test_towers_with_layers_between(batches):
    torch.manual_seed(0)
    model = Pair()
    check(view_of(model, blocks=[*model.decoder, *model.encoder]), batches)


@pytest.mark.parametrize("read_between", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_blocks_that_share_weights(read_between, together, batches):
    """A block that is not yet pruned may use weights that are: the dense model uses what they were."""
    torch.manual_seed(0)
    model = Tied(read_between)
    pairs = [nn.ModuleList(pair) for pair in zip(model.encoder, model.decoder, strict=True)]
    check(view_of(model, blocks=pairs if together else [*model.encoder, *model.decoder]), batches)


def test_what_is_not_understood_runs_two_models_for_each_block(batches):
    torch.manual_seed(0)
    model = Tower(lambda blocks, x: blocks[1](blocks[0](x, cache=object())))
    model.blocks = nn.ModuleList(Opaque() for _ in range(2))
    check(view_of(model, blocks=list(model.blocks)), batches)


def test_both_models_draw_the_same_random_numbers(batches):
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand_like(x))

    torch.manual_seed(0)
    model = Tower(chain)
    model.blocks = nn.ModuleList(Noisy() for _ in range(3))

    def forward(x: Tensor) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model(x)

    check(view_of(model, blocks=list(model.blocks), forward=forward), batches)


def test_beyond_the_budget(batches, tmp_path):
    check(tower(single.window_and_full), batches, budget=2000, spill=tmp_path)


def test_dense_inputs_are_their_own_target(batches):
    view = tower(chain)
    with Replayed(view, lambda: batches, stages(view), both=True, dense=True) as calls:
        for names in calls.order:
            found = calls.measure(names, OF_BOTH)
            for name in names:
                assert torch.equal(found["hessian"][name], found["dense_hessian"][name])
                assert torch.equal(found["input_means"][name], found["dense_means"][name])


def test_ranks_add_up(batches):
    whole, ranks, found = tower(chain), Ranks(2), {}
    views = [tower(chain) for _ in range(2)]

    def measured(view: PrunableView, share: Sequence, reduce: Ranks | None) -> dict:
        done = Blocks(view, reduce=reduce)
        with (
            Replayed(view, lambda: share, stages(view), both=True, reduce=reduce) as calls,
            PrunedStages(view, calls.order, done) as put,
        ):
            calls.put, sums = put, {}
            for number, names in enumerate(calls.order):
                sums |= {(s, name): v for s, of in calls.measure(names, OF_BOTH).items() for name, v in of.items()}
                put(())
                done.save(number, {name: Solved(view.weights[name].matrix() > 0) for name in names})
        return sums

    def run(rank: int) -> None:
        found[rank] = measured(views[rank], [batches[:2], batches[2:]][rank], ranks)

    threads = [Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, value in measured(whole, batches, None).items():
        for rank in range(2):
            torch.testing.assert_close(found[rank][key], value, rtol=1e-5, atol=1e-6)


def test_layers_that_are_called_otherwise_by_the_pruned_model(batches):
    """A model whose way depends on its values: the tokens of the two models do not belong together."""

    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.then = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.then(x[x.sum(-1) > 0])

    torch.manual_seed(0)
    view, done = view_of(Choosing()), None
    order = [["first.weight"], ["then.weight"]]
    done = Blocks(view)
    with (
        Replayed(view, lambda: batches, order, both=True) as calls,
        PrunedStages(view, order, done) as calls.put,
        pytest.raises(UserError, match="'then.weight' gets other tokens in the pruned model.*leave --target dense and"),
    ):
        for number, names in enumerate(order):
            calls.measure(names, OF_BOTH)
            weight = view.weights[names[0]].matrix()
            done.save(number, {names[0]: Solved(torch.zeros_like(weight, dtype=torch.bool))})


def test_xvlm(small_xvlm, small_batches):
    mixed = [*small_batches["general"][:1], *small_batches["region"][:1]]
    check(xvlm.prunable_view(small_xvlm), mixed)


@pytest.mark.parametrize("full", [False, True])
def test_blip(small_blip, blip_batches, full):
    """In full the text encoder runs without an image, too, on the blocks that it shares with the decoder."""
    view = blip.prunable_view(small_blip)
    check(view.in_full() if full else view, blip_batches["general"][:2])


@pytest.mark.parametrize("kind", ["clip", "llava"])
def test_transformers(kind):
    torch.manual_seed(0)
    view = prunable_view(tiny_models.TRANSFORMERS[kind]())
    check(view, [tiny_models.batch_for(kind, seed) for seed in range(2)])
