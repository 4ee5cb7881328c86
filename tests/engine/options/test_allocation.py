"""Options that say how much each layer loses: what they give a plan, and what they refuse in one line."""

import argparse

import pytest

import prune
from engine.options.allocation import allocation, check_mask_options, resolved
from sparsity.errors import UserError


def test_names_are_checked_and_files_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("vision: 0.7\n")
    assert allocation("error:output") == "error:output" == resolved("error:output")
    assert resolved(allocation(str(tmp_path / "a.yaml"))) == {"vision": 0.7}
    with pytest.raises(argparse.ArgumentTypeError, match=r"no allocation 'eror', did you mean 'error'\?.*FILE.yaml"):
        allocation("eror")
    with pytest.raises(UserError, match="there is no such file"):
        resolved("missing.yaml")


def test_what_is_given_goes_to_the_plan():
    given = ["--allocation_within", "group", "--min_keep", "0.1", "--allocation", "owl"]
    args = prune.parse(["-m", "xvlm", "-p", "wanda", *given])
    assert args.plan == {"allocation": "owl", "allocation_within": "group", "min_keep": 0.1}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--save_allocation", "a.yaml"], "give one to --sparsities"),
        (["--save_allocation", "a.txt", "-s", "75"], "must end in .yaml"),
        (["--from_weights", "w.safetensors"], "give that, too"),
        (["--from_mask", "missing.safetensors"], "there is no such file"),
        (["--from_mask", "m.safetensors", "--save_scores"], "leave it out with --from_mask"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, told):
    args = prune.parse(["-m", "xvlm", "-p", "wanda", *given])
    args.sparsities = [0.75] if args.sparsities else [0.63, 0.75]
    with pytest.raises(UserError) as error:
        check_mask_options(args)
    assert told in str(error.value) and "\n" not in str(error.value)
