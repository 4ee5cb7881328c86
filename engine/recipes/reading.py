"""YAML as nodes that know their lines, so that a complaint names the line."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import yaml

from configs.loading import compose
from sparsity.allocation.budget import as_written
from sparsity.errors import MissingFileError, UserError
from sparsity.files import reading

log = logging.getLogger(__name__)
_FRONT = re.compile(r"(?s).*?^---[ \t]*\n(.*?)^---[ \t]*$", re.MULTILINE)  # of a Markdown file
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Option:
    """One option of a command line. name: without its dashes. text: its value; None: it has none. where: file:line."""

    name: str
    text: str | None
    where: str


@dataclass(frozen=True)
class Document:
    """A file and its nodes. offset: lines of the file before those that the nodes count."""

    path: Path
    root: yaml.Node
    offset: int = 0

    def where(self, node: yaml.Node) -> str:
        """Return file:line of a node."""
        return f"{self.path}:{node.start_mark.line + 1 + self.offset}"

    def refuse(self, node: yaml.Node, message: str) -> UserError:
        """Return the error of a node, to be raised."""
        return UserError(f"{self.where(node)}: {message}")

    def entries(self, node: yaml.Node, what: str) -> list[tuple[yaml.Node, str, yaml.Node]]:
        """Return (key as a node, key, value) of a mapping. what: it is, for the message."""
        if not isinstance(node, yaml.MappingNode):
            raise self.refuse(node, f"expected {what}, keys and values")
        return [(key, self.text(key), value) for key, value in node.value]

    def text(self, node: yaml.Node) -> str:
        """Return a scalar as it is written."""
        if not isinstance(node, yaml.ScalarNode) or node.tag == f"{_TAG}null":
            raise self.refuse(node, "expected a value")
        if node.value.startswith("eval("):
            raise self.refuse(node, f"{node.value:.60}: expressions are not computed: write the value")
        return node.value

    def texts(self, node: yaml.Node) -> list[str]:
        """Return the scalars of a list, or the one that stands in its place."""
        if isinstance(node, yaml.SequenceNode):
            return [self.text(item) for item in node.value]
        return [self.text(node)]

    def flag(self, node: yaml.Node) -> bool:
        """Return a boolean."""
        text = self.text(node).lower()
        if text not in (*_TRUE, *_FALSE):
            raise self.refuse(node, f"expected true or false, got {text:.60}")
        return text in _TRUE

    def number(self, node: yaml.Node) -> Fraction:
        """Return a number, exactly as it is written."""
        found = None if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else as_written(self.text(node))
        if found is None:
            raise self.refuse(node, "expected a number")
        return found


def read_document(path: Path) -> Document:
    """Return the nodes of a YAML file, or of what stands between two lines "---" of a Markdown file. UserError or
    MissingFileError, one line that names the file, and the line where there is one.
    """
    if not os.path.isfile(path):
        raise MissingFileError(f"--recipe {path}: there is no such file")
    try:
        with reading(path):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid YAML: it is no text") from None
    offset = 0
    if path.suffix == ".md":
        front = _FRONT.match(text)
        if front is None:
            raise UserError(f"{path}: expected a recipe between two lines ---")
        text, offset = front[1], text.count("\n", 0, front.start(1))
    try:
        root = compose(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1 + offset}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise UserError(f"{path}: the recipe is empty")
    return Document(path, root, offset)


def joined(document: Document, node: yaml.Node) -> str:
    """Return a scalar, or a list or mapping of scalars as the command line has it: "a,b" or "a=1,b=2"."""
    if isinstance(node, yaml.MappingNode):
        return ",".join(f"{key}={document.text(value)}" for _, key, value in document.entries(node, "a mapping"))
    return ",".join(document.texts(node))


def written(stages: Mapping[str, Mapping[str, str | None]], title: str) -> str:
    """Return the YAML of stages, name -> option -> value (None: an option without one), below a line of comment."""
    lines = [f"# {title}"]
    for stage, options in stages.items():
        lines.append(f"{stage}:")
        lines += [f"  {name}: {'true' if text is None else _scalar(text)}" for name, text in options.items()]
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """Return a text as YAML reads it back; numbers, as they are written, need no quotes."""
    if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text):
        return text
    return yaml.safe_dump(text, width=10_000, allow_unicode=True, default_flow_style=True).removesuffix("...\n").strip()


class Arguments:
    """The arguments of a modifier, each taken once; what is left over at the end is not understood."""

    def __init__(self, document: Document, name: str, node: yaml.Node):
        self.document, self.name, self.node = document, name, node
        self._left = {text: (key, value) for key, text, value in document.entries(node, f"the arguments of {name}")}

    def take(self, key: str) -> yaml.Node | None:
        """Return the value of a key; None where it is not given."""
        _, value = self._left.pop(key, (None, None))
        return value

    def need(self, key: str) -> yaml.Node:
        """Return the value of a key. UserError where it is not given."""
        value = self.take(key)
        if value is None:
            raise self.document.refuse(self.node, f"{self.name} needs {key}")
        return value

    def share(self, key: str) -> str:
        """Return the value of a key that must be a fraction between 0 and 1, as the command line takes it."""
        node = self.need(key)
        if not 0 < self.document.number(node) < 1:
            raise self.document.refuse(node, f"{key}: expected a fraction between 0 and 1")
        return str(float(self.document.number(node)))

    def only(self, key: str, values: tuple[str, ...], told: str) -> None:
        """Refuse a value of a key, where it is given, but for these. told: why, and what to do."""
        node = self.take(key)
        if node is not None and self.document.text(node).lower() not in values:
            raise self.document.refuse(node, f"{key}: {told}")

    def note(self, key: str, told: str) -> None:
        """Log what becomes of a key, where it is given."""
        node = self.take(key)
        if node is not None:
            log.info("%s: %s: %s", self.document.where(node), key, told)

    def end(self) -> None:
        """Refuse the first key that nobody took."""
        for text, (key, _) in self._left.items():
            raise self.document.refuse(key, f"{text} of {self.name} is not understood: leave it out")
