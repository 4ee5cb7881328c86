"""The project's own recipes: the options of scripts, one script a stage.

    prune:                       # python prune.py --recipe recipe.yaml
      model: timm:vit_base_patch16_224
      pruner: wanda
      sparsities: [50, 75]
      calibration: images
    retrieval:                   # python retrieval.py --recipe recipe.yaml
      model: xvlm
      mask: masks.safetensors
    again:                       # python prune.py --recipe recipe.yaml:again
      script: prune
      ...

A key is a long option without its dashes; a list stands for values with commas, a mapping for name=value with commas,
true for an option without a value.
"""

import logging
from pathlib import Path

import yaml

from engine.recipes.reading import Document, Option, joined, read_document, written
from sparsity.errors import UserError
from sparsity.files import write_atomic

log = logging.getLogger(__name__)

NAME = "recipe.yaml"  # of the file beside a result
SCRIPT = "script"
SCRIPTS = ("prune", "retrieval", "captioning", "captioning_pretrain", "vqa", "image_classification")


def is_own(document: Document) -> bool:
    """Return whether a file is of the project's own form: one of its stages is a script's, or says which."""
    entries = document.root.value if isinstance(document.root, yaml.MappingNode) else []
    inside = [name.value for _, stage in entries if isinstance(stage, yaml.MappingNode) for name, _ in stage.value]
    return SCRIPT in inside or any(key.value in SCRIPTS for key, _ in entries)


def read_stages(document: Document) -> dict[str, tuple[str, list[Option]]]:
    """Return the stages of a file: name -> its script and options. UserError that names the line."""
    stages = {}
    for key, name, node in document.entries(document.root, "stages"):
        found = document.entries(node, f"the options of {name}")
        own = [(at, value) for at, option, value in found if option == SCRIPT]
        script = document.text(own[0][1]) if own else name
        if script not in SCRIPTS:
            at = own[0][1] if own else key
            raise document.refuse(at, f"there is no script {script!r:.60} that takes recipes: {', '.join(SCRIPTS)}")
        options = [_option(document, at, option, value) for at, option, value in found if option != SCRIPT]
        stages[name] = (script, [option for option in options if option is not None])
    return stages


def _option(document: Document, key: yaml.Node, name: str, node: yaml.Node) -> Option | None:
    """Return one option; None for one without a value that is false."""
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":bool"):
        return Option(name, None, document.where(key)) if document.flag(node) else None
    return Option(name, joined(document, node), document.where(key))


def save_stage(path: Path, script: str, options: dict[str, str | None], before: Path | None = None) -> None:
    """Write what a script was given, option -> value, as a recipe. before: that of the mask, whose stages of other
    scripts stand above.
    """
    stages = {name: found for name, found in _earlier(before).items() if name != script} if before else {}
    stages[script] = options
    title = "; ".join(f"python {name}.py --recipe {path.name}" for name in stages)
    write_atomic(path, written(stages, title).encode())


def _earlier(path: Path) -> dict[str, dict[str, str | None]]:
    """Return the stages of a recipe that are named as their script; none where there is no recipe that can be read: a
    run that is done must not fail for it.
    """
    try:
        document = read_document(path)
        stages = read_stages(document) if is_own(document) else {}
    except UserError as error:
        if path.exists():
            log.warning("the stages of %s are left out: %s", path, error)
        return {}
    return {name: {o.name: o.text for o in found} for name, (own, found) in stages.items() if own == name}
