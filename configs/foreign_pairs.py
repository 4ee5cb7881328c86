"""What fine-tuning of a model of transformers on a user's images and texts is configured by. Needs no torch."""

from dataclasses import dataclass

from configs.finetuning import CaptioningConfig, RetrievalConfig, VQAConfig
from configs.foreign import ForeignConfig
from configs.own_data import OwnDataConfig
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


def check_given(config: OwnDataConfig, what: str = "captions.json, a folder or shards") -> None:
    """Raise UserError or FileNotFoundError unless there is data of the user's: models of others know no other."""
    if not config.data:
        raise UserError(f"give --data {what}: docs/data.md shows what it holds")
    config.check_own()


@dataclass(frozen=True, kw_only=True)
class ForeignCaptioningConfig(ForeignConfig, CaptioningConfig):
    """Captioning by any model that writes about images.

    question: what it is asked, by default to describe the image in its chat template, or, where it has none, nothing:
    it goes on from "a picture of". max_tokens: of a caption that is trained on. max_length, min_length: of one that is
    generated, in tokens, without the question.
    """

    question: str | None = None
    label_smoothing: float = 0.0
    max_length: int = 40
    min_length: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing:
            raise UserError("label_smoothing is not for models of other libraries, which bring their own loss")

    def check_data(self, where: str) -> None:
        check_given(self)

    @property
    def generation(self) -> dict[str, int]:
        return {"num_beams": self.num_beams, "max_length": self.max_length, "min_new_tokens": self.min_length}


@dataclass(frozen=True, kw_only=True)
class ForeignVQAConfig(ForeignConfig, VQAConfig):
    """Visual question answering by any model that writes about images.

    wording: in whose {} a question stands, by default it alone in a chat template, or, where there is none, with words
    around it, as BLIP-2 is published. max_tokens: of an answer that is trained on. max_length: of one that is
    generated, in tokens. num_beams: of the search.
    """

    wording: str | None = None
    num_beams: int = 3
    max_length: int = 16

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "num_beams", "max_length")
        if self.wording is not None and "{}" not in self.wording:
            raise UserError(f"wording must have {{}} where the question stands, got {self.wording!r}")

    def check_data(self, where: str) -> None:
        check_given(self, "questions.json")

    @property
    def generation(self) -> dict[str, int]:
        """Options of the search for an answer."""
        return {"num_beams": self.num_beams, "max_length": self.max_length}
