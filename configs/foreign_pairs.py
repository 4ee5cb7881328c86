"""What fine-tuning of a model of transformers on a user's images and texts is configured by. Needs no torch."""

from dataclasses import dataclass

from configs.finetuning import RetrievalConfig
from configs.foreign import ForeignConfig
from configs.sources import at_least
from sparsity.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ForeignRetrievalConfig(ForeignConfig, RetrievalConfig):
    """Image-text retrieval by any model with two towers. batch_size_test: images, or texts, encoded together."""

    batch_size_test: int = 64

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "batch_size_test")

    def check_data(self, where: str) -> None:
        check_given(self)


def check_given(config: RetrievalConfig) -> None:
    """Raise UserError or FileNotFoundError unless there is data of the user's: models of others know no other."""
    if not config.data:
        raise UserError("give --data captions.json, a folder or shards: docs/data.md shows what they hold")
    config.check_own()
