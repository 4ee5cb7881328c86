"""YAML files to dataclasses and back: an unknown key or a wrong type is an error that names the file and the key."""

import dataclasses
import difflib
import logging
import math
import os
import reprlib
import types
import typing
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from configs.locations import located
from sparsity.errors import MissingFileError, UserError
from sparsity.files import reading, write_atomic

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger(__name__)
T = TypeVar("T", bound="DataclassInstance")
_MOST_KEYS = 10_000  # of a mapping
_LARGEST = 2**63 - 1


def load_config(path: str | Path, schema: type[T]) -> T:
    """Read a YAML mapping into the dataclass `schema`; keys that are left out keep their defaults.

    Raises FileNotFoundError or UserError (malformed YAML, unknown or missing key, wrong type, a value that the schema
    itself refuses), each one line that names the file.
    """
    return build(schema, read_yaml(path), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Mapping in a YAML file, by the safe loader; a key that stands twice is an error."""
    path = located(Path(path))
    if not os.path.isfile(path):
        raise MissingFileError(f"{path}: configuration file not found; see configs/ for those that exist")
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
        content = _Loader.read(text)
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: too many brackets in brackets") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # yaml raises these for `!!int x`, `!!bool x`, `!!timestamp x` and dates such as 2001-13-01
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of the one document of a YAML text, which know their lines and tags; None where it is empty.
    yaml.YAMLError for what is no YAML, and a key that stands twice.
    """
    return _Loader.nodes(text)


class _Loader(yaml.SafeLoader):
    """The safe loader, where no key may stand twice in a mapping, and merged mappings (<<) stay small."""

    @classmethod
    def read(cls, text: str) -> Any:
        """Return the content of the one document, as yaml.safe_load does."""
        loader = cls(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()

    @classmethod
    def nodes(cls, text: str) -> yaml.Node | None:
        """Return the one document as nodes, as yaml.compose does."""
        loader = cls(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.error.MarkedYAMLError(
                    problem=f"the key {key.value!r:.60} stands twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.error.MarkedYAMLError(problem=f"more than {_MOST_KEYS} keys", problem_mark=node.start_mark)


def configure(args: Namespace, task: str, schema: type[T], base: str = "_base") -> tuple[Path | None, T]:
    """The configuration file of a task and its content, where the options of the command line that have the name of a
    key (`--weights`, `--max_skipped`) take the place of the file's when they are given. base: what the name of the
    full-size model's file ends with. A schema whose keys all have defaults needs no file: then the path is None.
    """
    required = any(f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(schema))
    path = args.config
    if path is None and required:
        path = find_variant(located(Path("configs", args.model)), task, args.variant, args.weights, base)
    names = {f.name for f in dataclasses.fields(schema)}
    given = {name: _here(value) for name, value in vars(args).items() if name in names and value is not None}
    return path, dataclasses.replace(load_config(path, schema) if path else schema(), **given)


def sizes_beside(weights: str | Path) -> str | None:
    """Return the file of a model's sizes that the `config.yaml` of a run names, which lies beside its weights; None
    where there is none. weights: a file, or its folder.
    """
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    saved = folder / "config.yaml"
    content = read_yaml(saved).get("config") if saved.is_file() else None
    named = content.get("model_config") if isinstance(content, dict) else None
    return located(named) if isinstance(named, str) and named else None


def find_variant(folder: Path, task: str, variant: str, weights: str | None, base: str = "_base") -> Path:
    """`<folder>/<task>_mini.yaml`, or <task> + base for "base", which "auto" is where weights are given or its own are
    there.

    weights: a file, "random", or None for those of the configuration.
    """
    full = folder / f"{task}{base}.yaml"
    if variant == "auto":
        own = read_yaml(full).get("weights")
        variant = "base" if weights not in (None, "random") or Path(located(str(own))).is_file() else "mini"
        if variant == "mini":
            log.info("%s is not there: using the bundled %s-mini (--variant base for the full size)", own, folder.name)
    return full if variant == "base" else folder / f"{task}_{variant}.yaml"


def build(schema: type[T], values: Any, where: str) -> T:
    """Dataclass `schema` from a mapping; `where` (a file, then the keys that lead there) begins every message."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of keys to values, got {_shown(values)}")
    kinds = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(_shown(key).strip("'"), fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(fields)}"
            raise UserError(f"{where}: unknown key {_shown(key)}{hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: key {name!r} is missing")
    converted = {key: _convert(kinds[key], value, f"{where}: {key}") for key, value in values.items()}
    converted |= {name: located(f.default) for name, f in fields.items() if name not in values and _text(f.default)}
    try:
        return schema(**converted)
    except ValueError as error:  # from __post_init__
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` checked against the annotation `kind`; nested dataclasses, lists, tuples and unions are followed."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list, got {_shown(value)}")
        return origin(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a mapping, got {_shown(value)}")
        return {key: _convert(arguments[1], item, f"{where}: {key}") for key, item in value.items()}
    if kind is float:
        return _number(value, where)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = {int: "an integer", str: "a text", bool: "true or false"}.get(kind, kind.__name__)
        raise UserError(f"{where}: expected {expected}, got {_shown(value)}")
    if kind is int and not -_LARGEST <= value <= _LARGEST:
        raise UserError(f"{where}: expected an integer of 64 bits, got {_shown(value)}")
    return _here(value)


def _text(value: Any) -> typing.TypeGuard[str]:
    return isinstance(value, str)


def _here(value: Any) -> Any:
    return located(value) if _text(value) else value


def _number(value: Any, where: str) -> float:
    """Convert text such as 1e-4, which YAML 1.1 does not read as a number, to a number."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: expected a number, got {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    """Return the value for a message, shortened, even if aliases in the file make it endless."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 60
    shown.maxlevel = 2
    try:
        return shown.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a long {type(value).__name__}"


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration beside a result, as YAML that `load_config` reads."""
    plain = config
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        plain = dataclasses.asdict(config)
    write_atomic(path, yaml.safe_dump(_lists(plain), sort_keys=False, allow_unicode=True).encode())


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
