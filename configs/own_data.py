"""A user's own data in the place of what a configuration names. Needs no torch: checked at once."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from configs.shard_names import is_pattern, shard_paths
from configs.task import TaskConfig
from sparsity.errors import MissingFileError, UserError

HOW = "docs/data.md shows what it may be"


@dataclass(frozen=True, kw_only=True)
class OwnDataConfig(TaskConfig):
    """A task on data of the user's, where `data` is set (`--data`); else on what the other keys name.

    val_data: what the best weights are chosen by; by default `val_fraction` of the images of `data`, 0 for none, when
    the last weights are the result.
    """

    PUBLIC: ClassVar[tuple[str, ...]] = ()  # keys whose place the user's data takes

    data: str | None = None
    val_data: str | None = None
    val_fraction: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction must be from 0 to below 1, got {self.val_fraction!r}")
        if self.val_data and not self.data:
            raise UserError("val_data is for data of one's own: set data, too")

    def overridden(self, options: Mapping[str, Any]) -> "OwnDataConfig":
        """Without what the user's data takes the place of."""
        config = super().overridden(options)
        assert isinstance(config, OwnDataConfig)
        return replace(config, **config._unset()) if config.data else config

    def _unset(self) -> dict[str, Any]:
        return {
            f.name: f.default if f.default is not MISSING else f.default_factory()
            for f in fields(self)
            if f.name in self.PUBLIC
        }

    def check_own(self) -> None:
        """Raises FileNotFoundError or UserError where the user's data is not there."""
        for option, path in (("--data", self.data), ("--val_data", self.val_data)):
            if path:
                check_path(option, path)


def check_path(option: str, path: str) -> None:
    """Raise FileNotFoundError or UserError unless there is a file, a folder or shards of this name."""
    if is_pattern(path):
        shard_paths(path)
    elif not Path(path).exists():
        raise MissingFileError(f"{option} {path}: there is no such file or folder; {HOW}")
