"""Stored digests of masks that no sum of products decides: a change of the code that moves a single weight shows here.

Other pruners may order near-equal scores otherwise on another processor; scripts/compare_masks.sh compares those of two
revisions on one machine.
"""

import pytest

import pruners
from models.xvlm import model as xvlm

DIGESTS = {
    "rand": "fd7b43a76af28cb03cdd9b8ec52d3c3fe095399a0cb945a9a4401c315e976c50",
    "omp": "9ddbe9a45081f06e9b51bd2bb18ad1562f88dc0005519c3b0544ab121dced316",
    "localmp": "868bad974752a0b3119453d560acd66278d23a9fcf6f9f831855052ff560f0b0",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_masks_are_those_of_earlier_versions(name, small_xvlm):
    ((_, masks),) = pruners.build(name).prune(xvlm.prunable_view(small_xvlm), None, ["0.63"], seed=42)
    assert masks.digest() == DIGESTS[name]
