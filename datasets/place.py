"""The rank of a process among those that share the data."""

from dataclasses import dataclass

from sparsity.errors import UserError


@dataclass(frozen=True)
class Place:
    """A rank, one of `world_size`: batch b goes to rank b % world_size. Raises UserError for a rank out of range."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank must be between 0 and world_size - 1 = {self.world_size - 1}, got {self.rank!r}")

    def has(self, batch: int) -> bool:
        """Return whether a batch goes to this rank."""
        return batch % self.world_size == self.rank

    def batch(self, step: int) -> int:
        """Return the number of the batch that this rank reads in a step."""
        return step * self.world_size + self.rank


ALONE = Place()
