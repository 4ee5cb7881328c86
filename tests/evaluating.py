"""Evaluation alone, `--evaluate`, as all scripts that fine-tune have it."""

from collections.abc import Callable, Sequence
from pathlib import Path

CARDS = ("README.md", "config.yaml", "recipe.yaml")  # which say with what command they were made


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> content of all files in a folder, but for those that tell the command."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in CARDS)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found)}


def check_evaluation(main: Callable[[list[str]], None], given: Sequence[str], folder: Path) -> None:
    """Train, then evaluate: that run, whose results are gone, and its weights in a folder without a run.

    given: of the script, without `--output_dir` and weights.
    """
    run, alone = folder / "run", folder / "alone"
    main([*given, "--output_dir", str(run)])
    before = contents(run)
    results = {name: content for name, content in before.items() if name.startswith("result/")}
    weights = folder / "model.safetensors"
    for name in results:
        (run / name).replace(weights if name.endswith("/model.safetensors") else folder / "gone")
    main([*given, "--evaluate", "--output_dir", str(run)])
    assert contents(run) == before, "the same results, and nothing is trained"
    main([*given, "--evaluate", "-pre", str(weights), "--output_dir", str(alone)])
    assert contents(alone) == results, "no snapshot, no log"
