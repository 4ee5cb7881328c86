"""Files of named plans: which of them are taken, and the plans of scripts/quality.sh."""

from functools import partial
from pathlib import Path

import pytest

import pruners
from engine.options.plans import plans_of, read_plans
from sparsity.errors import UserError

FILE = Path("configs/quality/plans.yaml")


def chosen(path, names, options=None, pattern=None):
    return plans_of(path, names, lambda: ["omp"], options or {}, pattern, pruners.own_options)


def test_names_choose_plans_of_a_file_in_their_order(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("a: {pruner: omp}\nb: {pruner: wanda}\nc: {pruner: l2}\n")
    assert list(chosen(path, None)) == ["a", "b", "c"] and list(chosen(path, ["c", "a"])) == ["c", "a"]
    assert chosen(path, ["b"])["b"].pruner == "wanda"
    with pytest.raises(UserError, match="there is no plan 'omp'; there are: a, b, c"):
        chosen(path, ["a", "omp"])
    with pytest.raises(UserError, match="says patterns and options: leave scope, pattern out"):
        chosen(path, ["a"], {"scope": "row"}, "2:4")


def test_the_plans_of_quality_can_be_built_and_have_a_twin_with_a_pattern():
    plans = read_plans(FILE)
    for name, plan in plans.items():
        plan.build(name, partial(pruners.build, sparsities=["0.5"]))
        if plan.pattern is None:
            twin = plans[f"{name} 2:4"]
            assert (twin.pruner, twin.options, str(twin.pattern)) == (plan.pruner, plan.options, "2:4")
    assert len(plans) % 2 == 0
