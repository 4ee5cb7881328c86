"""Files of allocations: written, edited and read again, and what is refused."""

import pytest
import torch

import pruners
from configs.allocation import read_allocation, save_allocation
from sparsity.allocation.given import to_rules
from sparsity.errors import UserError
from tests.toys import layers, view_of


def test_a_saved_allocation_gives_the_same_counts_again(tmp_path):
    view = view_of(layers((7, 5), (11, 3), (4, 9)))
    masks = pruners.prune(view, "omp", sparsity="0.63")
    save_allocation(tmp_path / "a.yaml", to_rules(view, masks), "omp at 63")
    text = (tmp_path / "a.yaml").read_text()
    assert text.startswith("# omp at 63\n") and text.count(" %") == 3
    rules = read_allocation(tmp_path / "a.yaml")
    again = pruners.prune(view, "rand", sparsity="0.63", allocation=rules)
    lost = [{name: int((~mask).sum()) for name, mask in each.items()} for each in (masks, again)]
    assert lost[0] == lost[1] and not all(torch.equal(masks[name], again[name]) for name in masks)


def test_an_edited_file_holds_by_its_first_match_and_the_rest_fills_the_budget(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 0.2  # a group\n'b.*': 90\n'*': 1/2\n")
    view = view_of(layers((10, 10), (10, 10)))
    masks = pruners.prune(view, "omp", sparsity="0.55", allocation=read_allocation(tmp_path / "a.yaml"))
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"a.weight": 20, "b.weight": 90}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected rules"),
        ("a: [0.2]", "a: expected a sparsity"),
        ("a: true", "a: expected a sparsity"),
        ("a: 1\na: 2", "stands twice"),
        ("- a", "expected a mapping"),
    ],
)
def test_what_is_no_allocation_is_refused_in_one_line(tmp_path, text, told):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as error:
        read_allocation(tmp_path / "a.yaml")
    assert "a.yaml" in str(error.value) and "\n" not in str(error.value)
