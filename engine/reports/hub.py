"""Pruned models on the hub: what is said of them there, and their upload."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.reports.report import Metrics, markdown_table
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.view import PrunableView

CARD = "README.md"
FRONT = "---\nlibrary_name: {library}\ntags:\n- pruned\n- sparse\n---\n"


def card(model: str, masks: Masks, view: PrunableView, metrics: Metrics, facts: Mapping[str, Any]) -> str:
    """Return Markdown: of what model this is a pruned one, how sparse it is, and what was measured."""
    library = "transformers" if model.startswith("hf:") else "timm" if model.startswith("timm:") else "pytorch"
    report = masks.report(view)
    counts = report.groups | {"all": report.overall}
    rows = [{"weights": n, "kept": c.kept, "of": c.total, "sparsity %": 100 * c.sparsity} for n, c in counts.items()]
    parts = [FRONT.format(library=library), f"# {model.rpartition('/')[2]}, pruned\n"]
    parts.append("".join(f"- {name}: {value}\n" for name, value in {"dense model": model, **facts}.items()))
    parts.append("Pruned weights are zero; shapes and names are the dense model's: its library loads it as usual.\n")
    parts += ["## Sparsity\n", markdown_table(rows) + "\n"]
    if metrics:
        measured = [{"metric": name, "value": value} for name, value in metrics.items()]
        parts += ["## Evaluation\n", markdown_table(measured) + "\n"]
    return "\n".join(parts)


def upload(path: Path, repository: str, text: str) -> str:
    """Upload a folder, or a file of weights with its card, to a repository, which is made where it is not there; return
    its address. UserError where the hub refuses.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        url = hub.create_repo(repository, exist_ok=True, private=True)
        if path.is_dir():
            hub.upload_folder(repo_id=repository, folder_path=path)
        else:
            hub.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo="model.safetensors")
            hub.upload_file(repo_id=repository, path_or_fileobj=text.encode(), path_in_repo=CARD)
    except Exception as error:  # of the network, of the hub
        told = str(error).strip().splitlines()
        raise UserError(f"--push_to_hub {repository}: {told[0] if told else type(error).__name__}") from error
    return str(url)
