"""Files with what a run has done so far, which are read again only where every byte is as it was written."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from sparsity.bits import tensors_digest
from sparsity.files import write_atomic

logger = logging.getLogger(__name__)

_DIGEST = "digest"


def save_kept(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors and facts, whole or not at all. facts: "identity" says what they belong to."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, serialize(tensors, {**facts, _DIGEST: _digest(tensors, facts)}))


def load_kept(
    path: Path, identity: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return tensors and facts; None where there is no such file, or one of another identity, or a damaged one, so that
    a run computes it again.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            if facts.get("identity") != identity:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception:  # safetensors raises several kinds
        logger.warning("%s: damaged, and computed again", path)
        return None
    if facts.pop(_DIGEST, None) != _digest(tensors, facts):
        logger.warning("%s: damaged, and computed again", path)
        return None
    return {name: tensor.to(device) for name, tensor in tensors.items()}, facts


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    return tensors_digest(dict(sorted(tensors.items())), json.dumps(facts, sort_keys=True))
