"""Replayed sequential calibration equals running the whole model for each block, to the bit."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blip import model as blip
from models.external.model import prunable_view
from models.xvlm import model as xvlm
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.reconstruction.sparsegpt import reconstruct
from sparsity.replay.replayed import Replayed
from sparsity.run.sequential import Blocks, PrunedStages, Solved, by_blocks, stages
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.hessian import factor
from sparsity.statistics.passes import collect
from sparsity.view import PrunableView
from tests import tiny_models
from tests.toys import Ranks, view_of

pytestmark = pytest.mark.script  # long: left out of make test-fast

PATTERN, WIDTH = NM(2, 4), 8


def wanda(name: str, weight: Tensor, statistics: Mapping[str, Tensor]) -> tuple[Tensor, None]:
    scores = weight.abs().double() * statistics["input_norms"].sqrt()
    return PATTERN.keep(scores) if PATTERN.fits(weight.shape[1]) else scores > scores.median(), None


def sparsegpt(name: str, weight: Tensor, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return reconstruct(weight, factor(statistics["hessian"], weight.shape[1], name), None, PATTERN)


METHODS: dict[str, Callable] = {"input_norms": wanda, "hessian": sparsegpt}


def slowly(view: PrunableView, batches: Sequence, order: Sequence[Sequence[str]], statistic: str) -> Blocks:
    """Run the whole model, with all pruned stages in it, for each stage."""
    done = Blocks(view)
    with PrunedStages(view, order, done) as put:

        def measure(names):
            put(range([*map(list, order)].index(list(names))))
            return collect(view, [statistic], batches, names=names)

        by_blocks(order, measure, pruning(view, statistic), done)
    return done


def pruning(view: PrunableView, statistic: str) -> Callable:
    return lambda name, statistics: Solved(*METHODS[statistic](name, view.weights[name].matrix(), statistics))


def replayed(view: PrunableView, calls: Replayed, statistic: str, done: Blocks | None = None) -> Blocks:
    done = Blocks(view) if done is None else done
    with PrunedStages(view, calls.order, done) as calls.put:
        measure = lambda names: calls.measure(names, [statistic])  # noqa: E731
        by_blocks(calls.order, measure, pruning(view, statistic), done)
    return done


def check_same(found: Blocks, expected: Blocks) -> None:
    assert found.kept.keys() == expected.kept.keys()
    assert found.updates.keys() == expected.updates.keys()
    for name, kept in expected.kept.items():
        assert torch.equal(kept.tensor(), found.kept[name].tensor()), name
    for name, updated in expected.updates.items():
        assert torch.equal(updated, found.updates[name]), name


def state_of(model: nn.Module) -> dict:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules()]
    return {"hooks": hooks, "training": [m.training for m in model.modules()]}


def check(view: PrunableView, batches: Sequence, statistics: Sequence[str] = tuple(METHODS), **options) -> Replayed:
    """Statistics, masks and weights are the same to the bit, and the model is left as it was."""
    weights = {key: value.clone() for key, value in view.model.state_dict().items()}
    for statistic in statistics:
        view.forward(batches[0])  # transformers installs hooks of its own in the first pass
        before = state_of(view.model)
        with Replayed(view, lambda: batches, stages(view), **options) as calls:
            found = replayed(view, calls, statistic)
            assert state_of(view.model) == before
            expected = slowly(view, batches, calls.order, statistic)
        assert found.kept.keys() == view.weights.keys()
        check_same(found, expected)
    assert all(torch.equal(value, weights[key]) for key, value in view.model.state_dict().items())
    done = Blocks(view)
    with (
        Replayed(view, lambda: batches, stages(view), **options) as calls,
        PrunedStages(view, calls.order, done) as put,
    ):
        calls.put = put
        for number, names in enumerate(calls.order):
            both = calls.measure(names, ["gram", "input_norms", "hessian"])
            put(range(number))
            for statistic, values in both.items():
                expected = collect(view, statistic, batches, names=names)
                assert all(torch.equal(values[name], expected[name]) for name in names), (statistic, names)
            put(())
            norms = both["input_norms"]
            done.save(
                number, {n: Solved(*wanda(n, view.weights[n].matrix(), {"input_norms": norms[n]})) for n in names}
            )
    return calls


class Block(nn.Module):
    calls: Counter = Counter()

    def __init__(self):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: Tensor | float = 1.0) -> Tensor:
        self.calls[id(self)] += 1
        q = self.mix(x)
        x = x + F.scaled_dot_product_attention(q, x, x, attn_mask=mask)
        return x + scale * self.down(F.gelu(self.up(x)))


class Tower(nn.Module):
    """How blocks follow each other is `route`'s matter: (blocks, x) -> x."""

    def __init__(self, route: Callable, depth: int = 3):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(depth)), nn.LayerNorm(WIDTH)
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.route(self.blocks, x))


def chain(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def window_and_full(blocks, x):
    window = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(-2)
    for i, block in enumerate(blocks):
        x = block(x, mask=window if i % 2 else None, scale=torch.full((1,), 1.0 + i))
    return x


def in_place_between(blocks, x):
    for block in blocks:
        x = block(x)
        x.mul_(1.5)
    return x


def view_between(blocks, x):
    for block in blocks:
        x = block(x)[:, 1:]
    return x


def twice(blocks, x):
    return chain([blocks[0], blocks[1], blocks[0], blocks[2]], x)


def again_at_once(blocks, x):
    return chain([blocks[0], blocks[0], blocks[1], blocks[2], blocks[2]], x)


def second_to_last(blocks, x):
    states = [x := block(x) for block in blocks]
    return states[-2] + states[0].mean()


def registered_backwards(blocks, x):
    return chain(reversed(blocks), x)


ROUTES = [
    *(chain, window_and_full, in_place_between, view_between, twice, again_at_once, second_to_last),
    registered_backwards,
]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, tokens, WIDTH, generator=generator) for tokens in (7, 6, 7)]


def tower(route: Callable, depth: int = 3) -> PrunableView:
    torch.manual_seed(0)
    model = Tower(route, depth)
    return view_of(model, blocks=list(model.blocks))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_equals_the_slow_way(route, batches):
    check(tower(route), batches)


@pytest.mark.parametrize(
    ("route", "passes"), [(chain, 1), (window_and_full, 1), (in_place_between, 6), (second_to_last, 1)]
)
def test_a_block_costs_two_calls_and_a_chain_one_pass(route, passes, batches):
    """Besides the traced pass over the first batch."""
    view, read = tower(route, depth=6), Counter()

    def again():
        read["passes"] += 1
        return batches

    with Replayed(view, again, stages(view)) as calls:
        Block.calls.clear()
        replayed(view, calls, "input_norms")
    assert max(Block.calls.values()) <= 2 * len(batches)
    assert Block.calls[id(view.model.blocks[5])] == len(batches)  # nothing reads what the last one puts out
    assert read["passes"] == 1 + passes


def test_dense_inputs_cost_one_call(batches):
    view = tower(chain)
    with Replayed(view, lambda: batches, stages(view), dense=True) as calls:
        Block.calls.clear()
        for names in calls.order:
            found = calls.measure(names, ["hessian"])["hessian"]
            expected = collect(view, "hessian", batches, names=names)
            Block.calls.subtract({id(block): len(batches) for block in view.model.blocks})
            assert all(torch.equal(found[name], expected[name]) for name in names)
    assert set(Block.calls.values()) == {len(batches)}


class Pair(nn.Module):
    """A decoder that is registered before its encoder, a projector between, and a lone block of another kind."""

    def __init__(self):
        super().__init__()
        self.lone = Block()
        self.decoder = nn.ModuleList(Block() for _ in range(2))
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.second(F.gelu(self.first(chain(self.encoder, x))))
        x = self.lone(torch.cat([seen, x], dim=1))
        for block in self.decoder:
            x = block(x, scale=seen.mean(dim=1, keepdim=True))
        return x


def test_towers_are_pruned_in_the_order_in_which_they_run(batches, caplog):
    torch.manual_seed(0)
    model = Pair()
    view = view_of(model, blocks=[*model.decoder, *model.encoder])
    with caplog.at_level(logging.DEBUG):
        calls = check(view, batches)
    tops = [sorted({name.rpartition(".")[0].rpartition(".")[0] or name for name in names}) for names in calls.order]
    assert tops == [
        ["encoder.0"],
        ["encoder.1"],
        ["first.weight", "second.weight"],
        ["lone"],
        ["decoder.0"],
        ["decoder.1"],
    ]
    assert "encoder.0 -> encoder.1 -> first; second; lone" in caplog.text
    assert "measured in a pass through the model" in caplog.text


class Tied(nn.Module):
    """Two towers, layer by layer with one weight in common."""

    def __init__(self, read_between: bool):
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        for first, second in zip(self.encoder, self.decoder, strict=True):
            second.up, second.down = first.up, first.down
        self.read_between = read_between

    def forward(self, x: Tensor) -> Tensor:
        seen = chain(self.encoder, x)
        return chain(self.decoder, 2 * seen if self.read_between else x + 1)


@pytest.mark.parametrize("read_between", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_blocks_that_share_weights(read_between, together, batches):
    torch.manual_seed(0)
    model = Tied(read_between)
    pairs = [nn.ModuleList(pair) for pair in zip(model.encoder, model.decoder, strict=True)]
    check(view_of(model, blocks=pairs if together else [*model.encoder, *model.decoder]), batches)


def functional(blocks, x):
    """A layer's weight is read between blocks, without a call of the layer."""
    x = blocks[0](x)
    return blocks[2](blocks[1](F.linear(x, blocks[0].mix.weight)))


def test_weights_that_are_read_between_blocks(batches):
    check(tower(functional), batches)


class Leaves(Block):
    def __init__(self, shelf: dict):
        super().__init__()
        self.shelf = shelf

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x + self.shelf.get("left", 0))
        self.shelf["left"] = x * 2
        return x


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1))


class Opaque(Block):
    def forward(self, x: Tensor, cache: object = None) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("case", ["left", "in place", "opaque"])
def test_what_is_not_understood_takes_the_slow_way_and_says_why(case, batches, caplog):
    torch.manual_seed(0)
    shelf: dict = {}
    made = {"left": lambda: Leaves(shelf), "in place": InPlace, "opaque": Opaque}[case]
    more = {"cache": object()} if case == "opaque" else {}

    def route(blocks, x):
        shelf.clear()
        x = x + 0
        for block in blocks:
            x = block(x, **more)
        return x

    model = Tower(route)
    model.blocks = nn.ModuleList(made() for _ in range(2))
    check(view_of(model, blocks=list(model.blocks)), batches)
    reason = {"left": "not among its arguments", "in place": "in place", "opaque": "a object"}[case]
    assert reason in caplog.text and "runs the whole model for each block" in caplog.text


def test_batches_that_run_otherwise_than_the_first(batches, caplog):
    """Longer inputs go another way: what was not captured is measured by running the model."""

    def route(blocks, x):
        return chain(blocks, x) if x.shape[1] == 7 else chain([blocks[1], blocks[0], blocks[2]], x)

    check(tower(route), batches)
    assert "where it is not in the first batch" in caplog.text


def test_an_output_that_only_some_batches_read(batches):
    """Never computed from what is not there."""

    def route(blocks, x):
        first = blocks[0](x)
        last = blocks[2](blocks[1](first))
        return last + first if x.shape[1] == 6 else last

    class Then(Tower):
        def __init__(self):
            super().__init__(route)
            self.head = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().forward(x))

    torch.manual_seed(0)
    model = Then()
    check(view_of(model, blocks=list(model.blocks)), batches)


@pytest.mark.parametrize("depth", [1, 3])
def test_random_numbers_of_blocks_are_restored(depth, batches):
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand_like(x))

    torch.manual_seed(0)
    model = Tower(chain)
    model.blocks = nn.ModuleList(Noisy() for _ in range(depth))

    def forward(x: Tensor) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model(x)

    check(view_of(model, blocks=list(model.blocks), forward=forward), batches)


def test_under_autocast(batches):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(tower(window_and_full), batches, ["input_norms"])


def test_autocast_within_the_model(batches):
    def route(blocks, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = blocks[0](x)
        return blocks[2](blocks[1](x.float()))

    check(tower(route), batches, ["input_norms"])


@pytest.mark.parametrize("budget", [0, 5000])
def test_beyond_the_budget_calls_lie_in_a_file_that_vanishes(budget, batches, tmp_path):
    check(tower(window_and_full), batches, budget=budget, spill=tmp_path)
    assert not list(tmp_path.iterdir())
    view = tower(chain)
    with Replayed(view, lambda: batches, stages(view), budget=budget, spill=tmp_path) as calls:
        for names in calls.order:
            calls.measure(names, ["input_norms"])
            assert calls._store.held <= budget


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_goes_on_after_any_block(finished, batches, tmp_path):
    class KilledError(Exception):
        pass

    view, scratch = tower(window_and_full), Scratch(tmp_path / "run", "data")
    with Replayed(view, lambda: batches, stages(view)) as calls:
        whole = replayed(view, calls, "hessian")
        before = state_of(view.model), {key: value.clone() for key, value in view.model.state_dict().items()}
        left = iter(range(finished))

        def measure(names, statistics):
            if next(left, None) is None:
                raise KilledError
            return whole_measure(names, statistics)

        whole_measure, calls.measure = calls.measure, measure
        with pytest.raises(KilledError) if finished < 3 else nullcontext():
            replayed(view, calls, "hessian", Blocks(view, scratch))
    assert state_of(view.model) == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in view.model.state_dict().items())
    with Replayed(view, lambda: batches, stages(view)) as calls:
        resumed = replayed(view, calls, "hessian", Blocks(view, scratch))
    check_same(resumed, whole)
    resumed.forget()
    assert not list(tmp_path.iterdir())
    check_same(resumed, whole)  # what is removed can be read on


@pytest.mark.parametrize(("route", "most"), [(chain, 1), (window_and_full, 1), (second_to_last, 1)])
def test_pruned_weights_are_in_the_model_only_until_their_outputs_are_kept(route, most, batches):
    view = tower(route, depth=6)
    dense = {name: weight.parameter.data.data_ptr() for name, weight in view.weights.items()}
    done, found = Blocks(view), []
    with Replayed(view, lambda: batches, stages(view)) as calls, PrunedStages(view, calls.order, done) as put:

        def looking(stages):
            put(stages)
            found.append(sum(dense[n] != view.weights[n].parameter.data.data_ptr() for n in dense))

        calls.put = looking
        measure = lambda names: calls.measure(names, ["hessian"])  # noqa: E731
        by_blocks(calls.order, measure, pruning(view, "hessian"), done)
    assert max(found) == most * len(calls.order[0])


@pytest.mark.parametrize("moment", range(8))
def test_an_exception_leaves_the_model_untouched(moment, batches):
    """In the trace, in a capture, in a replay: at any call of a block."""
    view = tower(chain)
    before = state_of(view.model), {key: value.clone() for key, value in view.model.state_dict().items()}
    left = iter(range(2 + 2 * moment))

    class BrokenError(Exception):
        pass

    class Breaking(Block):
        def forward(self, *args, **kwargs):
            if next(left, None) is None:
                raise BrokenError
            return super().forward(*args, **kwargs)

    for block in view.model.blocks:
        block.__class__ = Breaking
    with pytest.raises(BrokenError), Replayed(view, lambda: batches, stages(view)) as calls:
        replayed(view, calls, "input_norms")
    assert state_of(view.model) == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in view.model.state_dict().items())


def test_ranks_replay_their_own_batches_and_add_up(batches):
    whole = tower(window_and_full)
    with Replayed(whole, lambda: batches, stages(whole)) as calls:
        expected = {s: calls.measure(names, ["hessian"]) for s, names in enumerate(calls.order)}
    for shares in ([batches[:2], batches[2:]], [batches, []]):
        ranks, found = Ranks(2), {}

        def run(rank: int, view: PrunableView, share: list, ranks: Ranks = ranks, found: dict = found) -> None:
            with Replayed(view, lambda: share, stages(view), reduce=ranks) as calls:
                found[rank] = {s: calls.measure(names, ["hessian"]) for s, names in enumerate(calls.order)}

        views = [tower(window_and_full) for _ in shares]  # not in the threads, which share the random numbers
        threads = [Thread(target=run, args=(rank, views[rank], share)) for rank, share in enumerate(shares)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for stage, sums in expected.items():
            for name, value in sums["hessian"].items():
                for rank in (0, 1):
                    torch.testing.assert_close(found[rank][stage]["hessian"][name], value, rtol=1e-12, atol=1e-12)


def test_names_that_are_no_stage(batches):
    view = tower(chain)
    with Replayed(view, lambda: batches, stages(view)) as calls, pytest.raises(ValueError, match="not a stage"):
        calls.measure(["blocks.0.up.weight"], ["gram"])


def test_a_layer_that_is_never_called(batches):
    view = tower(lambda blocks, x: blocks[0](x))
    with Replayed(view, lambda: batches, stages(view)) as calls, pytest.raises(UserError, match=r"blocks\.1\..*saw no"):
        replayed(view, calls, "input_norms")


def test_parts_of_a_block_are_stages_too(batches):
    """Each is measured on what the parts before it have become."""
    view = tower(window_and_full)
    order = [names[i : i + 1] for names in stages(view) for i in range(3)]
    with Replayed(view, lambda: batches, order) as calls:
        found = replayed(view, calls, "hessian")
        expected = slowly(view, batches, calls.order, "hessian")
    assert len(calls.order) == 9
    check_same(found, expected)


def test_xvlm(small_xvlm, small_batches):
    """Regions go through the last vision blocks with images of their own, and padding does not count."""
    mixed = [*small_batches["general"][:2], *small_batches["region"][:2]]
    check(xvlm.prunable_view(small_xvlm), mixed, ["hessian"])
    check(xvlm.prunable_view(small_xvlm), mixed[::-1], ["input_norms"])


def test_blip(small_blip, blip_batches):
    check(blip.prunable_view(small_blip), blip_batches["general"][:2])


@pytest.mark.parametrize("kind", ["vit", "swin", "eva_giant"])
def test_timm(kind):
    torch.manual_seed(0)
    side = tiny_models.side(kind)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 3, side, side, generator=generator) for _ in range(2)]
    check(prunable_view(tiny_models.make_timm(kind)), images, ["input_norms"])


@pytest.mark.parametrize("kind", ["clip", "llava", "blip2"])
def test_transformers(kind):
    torch.manual_seed(0)
    view = prunable_view(tiny_models.TRANSFORMERS[kind]())
    check(view, [tiny_models.batch_for(kind, seed) for seed in range(2)], ["input_norms"])
