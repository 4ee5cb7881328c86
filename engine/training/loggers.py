"""Where the numbers of a run go: a CSV file always, Weights & Biases and TensorBoard where they are asked for."""

import csv
import io
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sparsity.errors import UserError
from sparsity.files import append, write_atomic

VALIDATION = "validation/"  # how the names of metrics of a validation begin


class Logger(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class CsvLog:
    """CSV of (step, seconds, name, value); what a killed run logged beyond step `start` is removed, and of that step
    the validation, where it is `unvalidated`.
    """

    HEADER = ("step", "seconds", "name", "value")

    def __init__(self, path: Path, start: int, unvalidated: bool = False):
        self.path, self.begin = path, time.monotonic()
        kept = [row for row in self._rows() if int(row[0]) <= start]
        if unvalidated:
            kept = [row for row in kept if int(row[0]) < start or not row[2].startswith(VALIDATION)]
        write_atomic(path, _csv([self.HEADER, *kept]).encode())
        self.begin -= float(kept[-1][1]) if kept else 0.0

    def _rows(self) -> list[list[str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.reader(file) if len(row) == len(self.HEADER) and row[0].isdigit()]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        seconds = f"{time.monotonic() - self.begin:.0f}"
        append(self.path, _csv([step, seconds, name, f"{value:.6g}"] for name, value in values.items()))

    def close(self) -> None:
        """Every row is on disk already."""


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class WandbLog:
    """A run on Weights & Biases, kept in `folder`; a run that is resumed there goes on.

    Raises UserError where it cannot be begun.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str | None,
        tags: Sequence[str],
        offline: bool,
        config: Mapping[str, Any],
    ):
        import wandb

        kept = folder / "wandb_id.txt"
        if not kept.is_file():
            write_atomic(kept, secrets.token_hex(4).encode())
        try:
            self.run = wandb.init(
                project=project,
                name=name,
                tags=list(tags),
                dir=folder,
                id=kept.read_text(),
                resume="allow",
                mode="offline" if offline else "online",
                config=dict(config),
            )
        except Exception as error:  # of the network, or without a login
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"--wandb: {reason}; or give --wdb_offline") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoardLog:
    """Event files in `folder`; what was logged beyond step `start` is hidden."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
