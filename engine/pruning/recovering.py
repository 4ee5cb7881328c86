"""Interface of recovery as a pruning run calls it; the script builds it."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from sparsity.masks import Masks


class Recovering(Protocol):
    """Train what is kept; see engine.recovery.recovery. told: how, for the report."""

    @property
    def told(self) -> str: ...

    def recovered(self, masks: Masks, folder: Path) -> AbstractContextManager[Any]:
        """The model inside the block is the recovered one; gives `trained`, `before`, `after`, `step` and `seconds`."""

    def forget(self) -> None:
        """Remove what only a killed run needs."""
