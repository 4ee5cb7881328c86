"""Sparsities from a file, and the file that a run leaves."""

import json

import pytest
import torch
from torch import nn

from sparsity.allocation.given import Given, to_rules
from sparsity.errors import UserError
from tests.sparsity.allocation.parts import counts, part_of
from tests.toys import Attention, layers, view_of

A, B, C = "a.weight", "b.weight", "c.weight"


def three(**fields):
    return part_of(view_of(layers((10, 10), (10, 20), (5, 10)), group_of=lambda n: "text" if n == C else "vision"))


def test_the_first_rule_holds_and_the_rest_is_filled_to_the_budget():
    part = three()
    assert counts(Given({"a": 0.9, "text": "10", "*": 0.5}), part, "195/350") == [{A: 90, B: 100, C: 5}]
    assert counts(Given({"text": "1/10"}), part, "0.5", 0.8) == [{A: 57, B: 113, C: 5}, {A: 92, B: 183, C: 5}]
    assert counts(Given({B: 0, "a*": 100}), part, "0.3") == [{A: 100, B: 0, C: 5}]


def test_numbers_are_read_as_on_the_command_line():
    for text in (0.25, "0.25", 25, "25", "1/4"):
        assert counts(Given({"a": text}), three(), "0.5") == [{A: 25, B: 120, C: 30}]
    assert counts(Given({"a": 1, "b": "200/200"}), three(), "0.6") == [{A: 1, B: 200, C: 9}]


@pytest.mark.parametrize("bad", [-1, 101, "x", "5/4", None, float("nan"), True])
def test_a_bad_sparsity_names_the_rule(bad):
    with pytest.raises(UserError, match="rule 'vision'"):
        Given({"vision": bad})


@pytest.mark.parametrize(
    ("rules", "fields", "match"),
    [
        ({"audio": 0.5}, {}, "rule 'audio' matches no prunable layer and no group"),
        (
            {"vision": 0.9},
            {},
            "rules prune 270 of 350 weights, and the 1 layers without a rule cannot make that the 175",
        ),
        ({"*": 0.6}, {}, "rules prune 210 of 350 weights"),
        ({"a": 0.9}, {"min_keep": 0.2}, "rule for layer 'a.weight' prunes 90 of its 100 weights, and from 0 to 80"),
        ({"a": 0.1}, {"pruned": {A: 11}}, "rule for layer 'a.weight' prunes 10 of its 100 weights, and from 11 to 100"),
    ],
)
def test_rules_that_cannot_hold_are_one_clear_line(rules, fields, match):
    with pytest.raises(UserError, match=match) as error:
        Given(rules).contests(part_of(three().view, **fields), ["0.5"])
    assert "\n" not in str(error.value)


def test_rules_for_every_layer_may_miss_the_budget_by_their_rounding_alone():
    part = part_of(view_of(layers((1, 7), (1, 11), (1, 13))))  # 3.5 + 5.5 + 6.5 = 15.5
    assert counts(Given({"*": 0.5}), part, "15/31", "16/31") == [{A: 4, B: 5, C: 6}, {A: 4, B: 6, C: 6}]
    with pytest.raises(UserError, match="rules prune 17 of 31"):
        Given({"*": 0.5}).contests(part, ["18/31"])


def test_what_a_run_leaves_gives_the_same_counts_again():
    generator = torch.Generator().manual_seed(3)
    model = nn.ModuleDict({"x": Attention(8), "x1": Attention(6), "x[1]": layers((7, 9), (1, 3))})
    view = view_of(model)
    for share in (0.0, 0.37, 0.999):
        masks = {
            name: torch.rand(weight.parameter.shape, generator=generator) >= share
            for name, weight in view.weights.items()
        }
        pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
        rules = json.loads(json.dumps(to_rules(view, masks)))
        assert len(rules) == len(view.weights)
        sparsity = f"{sum(pruned.values())}/{view.numel}"
        assert counts(Given(rules), part_of(view), sparsity) == [pruned]


def test_a_tied_weight_is_matched_by_each_of_its_names():
    view = view_of(Attention(8))
    (first,) = counts(Given({"up": "3/4"}), part_of(view), "0.5")
    assert counts(Given({"again": "3/4"}), part_of(view), "0.5") == [first]
    assert first["up.weight"] == 96
