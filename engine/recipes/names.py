"""Names of layers as other tools select them, as `--include` and `--exclude` take them."""

import re
from glob import escape

import yaml

from engine.recipes.reading import Document

ALL = ("__ALL__", "__ALL_PRUNABLE__", "Linear")  # stand for all layers that can be pruned
REGEX = "re:"


def selected(document: Document, node: yaml.Node) -> tuple[str, ...]:
    """Return what a list selects: names of layers as globs, and "re:" patterns; none where it stands for all.

    UserError, with the line, for a pattern that is none, and for a class of layers: which these are, the names say.
    """
    found = []
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        text = document.text(item)
        if text in ALL:
            return ()
        found.append(_checked(document, item, text))
    if not found:
        raise document.refuse(node, "expected names of layers, or __ALL_PRUNABLE__")
    return tuple(found)


def _checked(document: Document, node: yaml.Node, text: str) -> str:
    if "," in text:
        raise document.refuse(node, f"{text:.60}: a pattern with a comma cannot be given: write two")
    if text.startswith(REGEX):
        try:
            re.compile(text.removeprefix(REGEX))
        except re.error as error:
            raise document.refuse(node, f"{text:.60}: no regular expression: {error}") from None
        return text
    if text[:1].isupper() and "." not in text:
        raise document.refuse(
            node, f"{text:.60}: a class of layers: give their names, or a pattern such as re:.*attn.*"
        )
    return escape(text.removesuffix(".weight"))
