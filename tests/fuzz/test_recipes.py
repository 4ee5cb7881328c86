"""Damaged recipes: options that the command line takes, or one line that names the file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prune
from engine.recipes.reading import read_document
from tests.engine.recipes.test_foreign import STAGES, TRAINED, WANDA
from tests.engine.recipes.test_own import TWO
from tests.fuzz.damage import check, damaged_bytes, fuzzed
from tests.fuzz.test_configurations import FRAGMENTS

pytestmark = pytest.mark.script
RECIPES = {"own": TWO[: TWO.index("again")], "SparseML": TRAINED, "llm-compressor": STAGES, "Wanda": WANDA}


@st.composite
def damaged(draw, text):
    """The text with other bytes, a fragment in place of a value, or a line that is lost or stands twice."""
    kind = draw(st.sampled_from(("bytes", "fragment", "lost", "twice")))
    if kind == "bytes":
        return draw(damaged_bytes(text.encode()))
    lines = text.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    fragment = f"{lines[place].partition(':')[0]}: {draw(st.sampled_from(FRAGMENTS))}\n"
    middle = {"fragment": [fragment], "lost": [], "twice": [lines[place]] * 2}[kind]
    return "".join([*lines[:place], *middle, *lines[place + 1 :]]).encode()


@pytest.mark.parametrize("kind", RECIPES)
@fuzzed
@given(data=st.data())
def test_recipes(folder, kind, data):
    path = folder / "recipe.yaml"
    path.write_bytes(data.draw(damaged(RECIPES[kind])))

    def load():
        try:
            return prune.parse(["-m", "timm:test_vit", "-p", "omp", "--recipe", str(path)])
        except SystemExit:  # of argparse, for a value that only all options together refuse
            pytest.fail(f"refused without its line: {path.read_bytes()!r}")

    def right(args):
        args.recipe.save(folder / "again")
        again = prune.parse(["--recipe", str(folder / "again" / "recipe.yaml")])
        return again == args and read_document(path).root is not None

    check(f"recipes, {kind}", path, load, right)
