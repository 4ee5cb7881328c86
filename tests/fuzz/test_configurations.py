"""Configurations and texts of the command line: what they say, or one line."""

import argparse
import dataclasses
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import yaml
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st

from configs.loading import load_config, save_config
from configs.shard_names import shard_names
from sparsity.allocation.budget import budget, parse_sparsities
from sparsity.errors import UserError
from sparsity.pattern import parse_pattern
from tests.fuzz.damage import check, damaged_bytes, damaged_json, fuzzed
from tests.test_bad_input import BAD_TEXTS, SCHEMAS

pytestmark = pytest.mark.script

FRAGMENTS = (
    *(
        "!!int x",
        "!!bool x",
        "!!float x",
        "!!timestamp x",
        "!!binary x",
        "!!set {a}",
        "!!python/name:os.system",
        "!a b",
    ),
    *("2001-13-45", "0x_", "0b_", "1:99:99", "1_0", ".inf", "~", "- ", "? [a]", ": ", "\t", "%YAML 9.9", "---", "..."),
    *("*a", "&a [*a]", "<<: *a", "<<: 3", "<<: [{a: 1}]", "|", ">", "'", '"', "#", "@", "`", "\\", "\x85", "\ufeff"),
    "&a [" + "x," * 9 + "x]\n" + "".join(f"b{i}: &b{i} [{f'*b{i - 1},' * 9}]\n" for i in range(1, 20)),
)


@st.composite
def damaged_yaml(draw: Any, content: dict) -> bytes:
    kind = draw(st.sampled_from(("values", "bytes", "fragment", "line twice")))
    if kind == "values":
        return yaml.safe_dump(draw(damaged_json(content))).encode()
    text = yaml.safe_dump(content, default_flow_style=draw(st.booleans()))
    if kind == "bytes":
        return draw(damaged_bytes(text.encode()))
    lines = text.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    if kind == "line twice":
        return "".join([*lines[: place + 1], *lines[place:]]).encode()
    key = draw(st.sampled_from(("", lines[place].partition(":")[0] + ": ")))
    return "".join(
        [*lines[:place], key + draw(st.sampled_from(FRAGMENTS)) + "\n", *lines[place + bool(key) :]]
    ).encode()


def agrees(value: Any, plain: Any) -> bool:
    """Whether a configuration holds what the YAML says."""
    if dataclasses.is_dataclass(value):
        return all(agrees(getattr(value, key), item) for key, item in plain.items())
    if isinstance(value, list | tuple):
        return len(value) == len(plain) and all(map(agrees, value, plain))
    if isinstance(value, dict):
        return value.keys() == plain.keys() and all(agrees(value[key], plain[key]) for key in value)
    if isinstance(value, float):
        return math.isfinite(value) and value == float(plain)
    return type(value) is type(plain) and value == plain


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
@fuzzed
@given(data=st.data())
def test_yaml(folder, schema, data):
    path, content = folder / "fuzzed.yaml", SCHEMAS[schema].content
    path.write_bytes(data.draw(damaged_yaml(content)))

    def right(config: Any) -> bool:
        save_config(config, folder / "again.yaml")
        again = load_config(folder / "again.yaml", schema)
        return again == config and agrees(config, yaml.safe_load(path.read_bytes().decode()) or {})

    check(f"YAML, {schema.__name__}", path, lambda: load_config(path, schema), right)


TEXT = st.text(max_size=12) | st.text(alphabet="0123456789.,:eE+-_ /%naifNT{}*[]?tr\x00\n٣", max_size=12)
NUMBERS = st.sampled_from(
    ("0", "1", "63", "99.99", "1e-9", "1e999999999", "1e-999999999", "9" * 6000, "-1", "0x10", "")
)

SMALL = st.integers(0, 40).map(str)


@fuzzed
@given(text=TEXT | st.tuples(NUMBERS | SMALL, NUMBERS | SMALL).map(":".join))
def test_patterns(text):
    def right(pattern):
        return text == "unstructured" if pattern is None else [pattern.n, pattern.m] == list(map(int, text.split(":")))

    check("patterns", "pattern", lambda: parse_pattern(text), right)


@fuzzed
@given(text=TEXT | st.lists(NUMBERS | SMALL, max_size=3).map(",".join))
def test_sparsities(text):
    def right(found):
        values = [Decimal(item.strip()) for item in text.split(",")]
        exact = [Fraction(value) / (1 if value < 1 else 100) for value in values]
        return exact == list(map(Fraction, found)) and [budget(s, 10**9) for s in found] == [
            int(e * 10**9) for e in exact
        ]

    check("sparsities", "sparsit", lambda: parse_sparsities(text), right)


NAMES = st.sampled_from(
    ("a", "{0..3}", "{00000..00331}", "{a,b}", "{a,b{0..9..2}}", "{0..99999999999}", "{", "}", ",", "/")
)


@fuzzed
@given(text=st.one_of(TEXT, st.lists(NAMES, max_size=30).map("".join)).map(lambda text: text + ".tar"))
def test_names_of_shards(tmp_path_factory, text):
    text = f"{tmp_path_factory.getbasetemp()}/none/{text}"

    def right(found):
        return any(letter in text for letter in "*?[") or found == list(braceexpand(text, escape=False))

    check("names of shards", "none", lambda: shard_names(text), right)


@pytest.mark.parametrize(
    "kind",
    BAD_TEXTS,
    ids=lambda kind: kind.__name__,
)
@fuzzed
@given(text=TEXT | NUMBERS | st.tuples(NUMBERS, st.sampled_from(("GB", "KB", "=a", ",1", "%"))).map("".join))
def test_values_of_options(kind, text):
    def load():
        try:
            return kind(text)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise UserError("refused") from error  # argparse names the option

    check("values of options", "refused", load, lambda value: value is not None)
