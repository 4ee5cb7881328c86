"""YAML to dataclasses: what is read, what is refused, and in which words."""

import dataclasses
from dataclasses import dataclass, field

import pytest

from configs.loading import build, find_variant, load_config, read_yaml, save_config
from sparsity.errors import UserError


@dataclass(frozen=True)
class Inner:
    width: int = 8
    name: str | None = None


@dataclass(frozen=True)
class Schema:
    weights: str
    lr: float = 1e-3
    flag: bool = False
    betas: tuple[float, ...] = (0.9, 0.98)
    parts: list[Inner] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    table: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr!r}")


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return load_config(path, Schema)

    return read


def message(call, *arguments):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_stay_where_a_key_is_left_out(read):
    assert read("weights: w") == Schema("w")


def test_nested_dataclasses_lists_tuples_and_mappings(read):
    config = read("{weights: w, betas: [0, 1], parts: [{width: 1}, {name: x}], inner: {width: 3}, table: {a: 1}}")
    assert config == Schema("w", betas=(0.0, 1.0), parts=[Inner(1), Inner(name="x")], inner=Inner(3), table={"a": 1})


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_numbers_as_people_write_them(read, text):
    assert read(f"{{weights: w, lr: {text}}}").lr == 1e-4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{weights: w, wieghts: x}", "unknown key 'wieghts'; did you mean 'weights'?"),
        ("{weights: w, parts: [{widht: 1}]}", "parts[0]: unknown key 'widht'; did you mean 'width'?"),
        ("{weights: w, zzzzzz: 1}", "known keys: weights, lr"),
        ("{weights: w, 1: 1}", "unknown key 1"),
        ("{lr: 1}", "key 'weights' is missing"),
        ("{weights: 3}", "weights: expected a text, got 3"),
        ("{weights: null}", "weights: expected a text, got None"),
        ("{weights: w, lr: fast}", "lr: expected a number, got 'fast'"),
        ("{weights: w, lr: true}", "lr: expected a number, got True"),
        ("{weights: w, lr: .nan}", "lr: expected a number, got nan"),
        ("{weights: w, lr: 0}", "lr must be above 0, got 0.0"),
        ("{weights: w, flag: 1}", "flag: expected true or false, got 1"),
        ("{weights: w, betas: 0.9}", "betas: expected a list, got 0.9"),
        ("{weights: w, inner: 3}", "inner: expected a mapping of keys to values, got 3"),
        ("{weights: w, inner: {width: 1.5}}", "inner: width: expected an integer, got 1.5"),
        ("{weights: w, inner: {width: true}}", "inner: width: expected an integer, got True"),
        ("{weights: w, inner: {name: [x]}}", "inner: name: expected a text, got ['x']"),
        ("{weights: w, table: {a: x}}", "table: a: expected an integer, got 'x'"),
        ("[weights]", "expected a mapping of keys to values, got list"),
        ("weights", "expected a mapping of keys to values, got str"),
        ("{weights: w", "not valid YAML"),
        ("weights: *nothing", "not valid YAML"),
        ("weights: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("weights: w\n\tlr: 1", "not valid YAML"),
    ],
)
def test_refusals_name_the_file_and_the_key(read, text, told):
    text = message(read, text)
    assert "c.yaml: " in text and told in text


def test_a_file_that_is_missing_or_binary_is_named(tmp_path):
    assert "nothing.yaml: configuration file not found" in message(load_config, tmp_path / "nothing.yaml", Schema)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "b.yaml: not valid YAML" in message(read_yaml, tmp_path / "b.yaml")


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    (tmp_path / "e.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "e.yaml") == {}


def test_round_trip(tmp_path):
    config = Schema("é: #", 1e-5, True, (0.5, 0.6), [Inner(2, "a")], Inner(1), {"b": 2})
    save_config(config, tmp_path / "out" / "c.yaml")
    assert load_config(tmp_path / "out" / "c.yaml", Schema) == config


def test_build_takes_what_asdict_gives():
    config = Schema("w", inner=Inner(3))
    plain = dataclasses.asdict(config) | {"betas": list(config.betas)}
    assert build(Schema, plain, "here") == config


def test_the_full_size_is_chosen_where_its_weights_are(tmp_path):
    weights = tmp_path / "full.pth"
    (tmp_path / "prune_base.yaml").write_text(f"weights: {weights}")

    def chosen(variant, given):
        return find_variant(tmp_path, "prune", variant, given).stem.removeprefix("prune_")

    assert chosen("auto", None) == chosen("auto", "random") == "mini"
    assert chosen("auto", "given.pth") == chosen("base", None) == "base"
    weights.touch()
    assert chosen("auto", None) == "base" and chosen("mini", None) == "mini"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: a\nweights: b", "the key 'weights' stands twice"),
        (f"{'w' * 1000}: a\n{'w' * 1000}: b", "the key 'w{59} stands twice"),
        ("inner: {size: 1, size: 2}", "the key 'size' stands twice"),
        ("a: 2001-13-01", "month must be in 1..12"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: 0x_", "not valid YAML"),
        ("a: " + "[" * 20_000, "too many brackets in brackets"),
    ],
)
@pytest.mark.script
def test_yaml_that_its_own_library_stumbles_over(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_yaml(tmp_path / "c.yaml")
    assert "\n" not in str(error.value) and "c.yaml" in str(error.value)


def test_aliases_of_aliases_are_not_written_out(tmp_path):
    lists = [f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "c.yaml").write_text("\n".join(["weights:", "- &l0 [x]", *(f"- {text}" for text in lists)]))
    with pytest.raises(UserError, match="weights: expected a text, got ") as error:
        load_config(tmp_path / "c.yaml", Schema)
    assert len(str(error.value)) < 1000
