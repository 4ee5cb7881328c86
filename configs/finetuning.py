"""Options of the fine-tuning scripts, as they stand in configs/<model>/<task>.yaml. Needs no torch: checked at once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from configs.locations import located
from configs.pruning import BUNDLED_SPLITS, Evaluation
from configs.sources import HOW_TO_GET, Files, LabelledImages, at_least, is_hosted
from configs.task import DEBUG_IMAGES, OwnDataConfig, TaskConfig
from sparsity.errors import MissingFileError, UserError


@dataclass(frozen=True, kw_only=True)
class BundledSplits:
    """Bundled scenes, the same in every run: `val_scenes` choose the best weights, `test_scenes` of each split in
    `test` (see `configs.pruning.Evaluation`) say what they are worth.
    """

    val_scenes: int
    test_scenes: int
    test: list[str] = field(default_factory=lambda: ["scenes", "unseen_scenes"])

    def __post_init__(self):
        at_least(self, 1, "val_scenes", "test_scenes")
        for split in self.test:
            if split not in BUNDLED_SPLITS:
                raise UserError(f"bundled.test must be of {', '.join(BUNDLED_SPLITS)}, got {split!r}")


@dataclass(frozen=True, kw_only=True)
class CaptionedScenes(BundledSplits):
    """`train_scenes` in an epoch, drawn anew in each, with their captions."""

    train_scenes: int

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "train_scenes")


@dataclass(frozen=True, kw_only=True)
class CaptionedConfig(OwnDataConfig):
    """A task on images with captions: the user's, files in the COCO layout (Karpathy's split), or the bundled
    scenes.
    """

    PUBLIC = ("train_file", "val_file", "test_file", "image_root", "bundled", "val_gt_file", "test_gt_file")

    train_file: list[str] = field(default_factory=list)
    val_file: str | None = None
    test_file: str | None = None
    image_root: str | None = None
    bundled: CaptionedScenes | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.bundled and (self.train_file or self.val_file or self.test_file or self.image_root):
            raise UserError("set bundled, or train_file, val_file, test_file and image_root, not both")

    def check_data(self, where: str) -> None:
        self.check_own()
        if self.data or self.bundled:
            return
        for name in ("train_file", "val_file", "test_file", "image_root"):
            if not getattr(self, name):
                raise UserError(f"{where}: no data: set {name}, or bundled, or give --data")
        for annotations in (*self.train_file, self.val_file, self.test_file):
            self.files(annotations).check()

    def files(self, annotations: str | None) -> Files:
        """Return one of the annotation files, with the folder of its images."""
        assert annotations and self.image_root, "check_data has seen that both are given"
        return Files(annotations, self.image_root)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(CaptionedConfig):
    """Image-text retrieval.

    k_test: candidates of each query that the ITM head re-ranks. half_tokens: see `configs.pruning.Evaluation`.
    negative_all_rank: hard negatives come from the batches of all devices.
    """

    k_test: int = 256
    half_tokens: bool = False
    negative_all_rank: bool = True

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "k_test")

    def evaluations(self, debug: bool = False) -> dict[str, Evaluation]:
        """By name: "val", by which the best weights are chosen, then what they are tested on. The user's data is
        handed on beside them.
        """
        limit = DEBUG_IMAGES if debug else None
        options = {"k_test": self.k_test, "half_tokens": self.half_tokens, "limit": limit}
        if self.data:
            return {"val": Evaluation(**options)} if self.val_data or self.val_fraction else {}
        if not self.bundled:
            files = {"val": self.val_file, "test": self.test_file}
            return {name: Evaluation(files=self.files(file), **options) for name, file in files.items()}
        val = Evaluation(bundled_scenes=self.bundled.val_scenes, bundled_seed=1, **options)
        scenes = {"bundled_scenes": self.bundled.test_scenes, **options}
        return {"val": val} | {split: Evaluation(bundled_split=split, **scenes) for split in self.bundled.test}


@dataclass(frozen=True, kw_only=True)
class BundledVQA(BundledSplits):
    """`train_questions` in an epoch, each about a scene drawn anew; of the fixed scenes, all that can be asked."""

    train_questions: int

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "train_questions")


@dataclass(frozen=True, kw_only=True)
class VQAConfig(OwnDataConfig):
    """Visual question answering, on the user's questions, on files in the layouts of VQA2 and Visual Genome or on the
    bundled scenes.

    val_file: whose questions, with known answers, are answered after each epoch, to choose the best weights; the last
    ones are the result without one. answer_list: the answers that there are to choose from, but for the bundled scenes.
    k_test: those that are scored for each question. batch_size_test: images whose questions are answered together.
    """

    PUBLIC = ("train_file", "val_file", "test_file", "answer_list", "vqa_root", "vg_root", "bundled")

    train_file: list[str] = field(default_factory=list)
    val_file: list[str] = field(default_factory=list)
    test_file: list[str] = field(default_factory=list)
    answer_list: str | None = None
    vqa_root: str | None = None
    vg_root: str | None = None
    bundled: BundledVQA | None = None
    k_test: int = 128
    batch_size_test: int = 64

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "k_test", "batch_size_test")
        if self.bundled and (self.train_file or self.val_file or self.test_file or self.answer_list):
            raise UserError("set bundled, or train_file, val_file, test_file and answer_list, not both")

    def check_data(self, where: str) -> None:
        self.check_own()
        if self.data or self.bundled:
            return
        for name in ("train_file", "test_file", "answer_list", "vqa_root"):
            if not getattr(self, name):
                raise UserError(f"{where}: no data: set {name}, or bundled, or give --data")
        assert self.answer_list and self.vqa_root
        for annotations in (*self.train_file, *self.val_file, *self.test_file, self.answer_list):
            Files(annotations, self.vqa_root).check()
        if self.vg_root and not Path(self.vg_root).is_dir():
            raise MissingFileError(f"{self.vg_root}: image folder not found; {HOW_TO_GET}")


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig(CaptionedConfig):
    """Captioning.

    val_gt_file, test_gt_file: the captions to compare with, in COCO's format; default those of val_file and test_file.
    prompt: what every caption begins with, learned by none. max_length, min_length: of a generated caption, in tokens,
    with the prompt. batch_size_test: images that are described together.
    """

    val_gt_file: str | None = None
    test_gt_file: str | None = None
    prompt: str = "a picture of "
    label_smoothing: float = 0.1
    num_beams: int = 3
    max_length: int = 20
    min_length: int = 5
    batch_size_test: int = 64

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "num_beams", "min_length", "batch_size_test")
        at_least(self, self.min_length, "max_length")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be from 0 to below 1, got {self.label_smoothing!r}")

    def check_data(self, where: str) -> None:
        super().check_data(where)
        for annotations in (self.val_gt_file, self.test_gt_file):
            if annotations and not (self.data or self.bundled):
                self.files(annotations).check()

    @property
    def generation(self) -> dict[str, int]:
        """Options of the search for a caption."""
        return {"num_beams": self.num_beams, "max_length": self.max_length, "min_length": self.min_length}

    def check_lengths(self, prompt: int, tokens: int, positions: int) -> None:
        """Raise UserError unless captions have room beside a prompt of so many tokens: in training in texts of at most
        `tokens`, in generation in a model of so many positions.
        """
        if prompt + 1 >= tokens:
            raise UserError(f"max_tokens must be above the {prompt + 1} tokens of the prompt and [SEP], got {tokens!r}")
        if not prompt < self.max_length <= positions:
            limits = f"above the {prompt} tokens of the prompt and at most {positions} positions"
            raise UserError(f"max_length must be {limits}, got {self.max_length!r}")


@dataclass(frozen=True)
class BundledPairs:
    """The bundled scenes: `train_scenes` in an epoch, drawn anew in each."""

    train_scenes: int

    def __post_init__(self):
        at_least(self, 1, "train_scenes")


@dataclass(frozen=True, kw_only=True)
class CaptioningPretrainConfig(TaskConfig):
    """Language modelling on image-text pairs, in annotated files or WebDataset shards, or on the bundled scenes.

    streams: places of the shards that are read at the same time, a multiple of devices x workers.
    """

    train: list[Files] = field(default_factory=list)
    bundled: BundledPairs | None = None
    label_smoothing: float = 0.0
    streams: int = 16

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "streams")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be from 0 to below 1, got {self.label_smoothing!r}")
        if self.bundled and self.train:
            raise UserError("set bundled or train, not both")

    def check_data(self, where: str) -> None:
        if not self.bundled and not self.train:
            raise UserError(f"{where}: no data: set train, or bundled")
        for files in self.train:
            files.check()


# What there is to classify -> its splits for training and for tests, where it is of `datasets.labelled.public`.
CLASSIFICATION = {
    "bundled": (),
    "cifar10": (),
    "cifar100": (),
    "flowers102": ("train", "test"),
    "imagenet": ("train", "val"),
}
BUNDLED_IMAGES = ("seen", "unseen")


@dataclass(frozen=True)
class BundledImages:
    """The bundled glyphs: `train_images` in an epoch, drawn anew in each; validation on `val_images` of the fonts of
    training. test: "seen", the fonts of training, and "unseen", the one that training never shows, `test_images` each.
    """

    train_images: int = 10000
    val_images: int = 556
    test_images: int = 5004
    test: list[str] = field(default_factory=lambda: list(BUNDLED_IMAGES))

    def __post_init__(self):
        at_least(self, 1, "train_images", "val_images", "test_images")
        for split in self.test:
            if split not in BUNDLED_IMAGES:
                raise UserError(f"bundled.test must be of {', '.join(BUNDLED_IMAGES)}, got {split!r}")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TaskConfig):
    """Image classification. dataset: one of CLASSIFICATION, whose folder is data_root, default data/<dataset>; or a
    folder with train/ and val/ of class folders, or one of class folders. val_fraction: share of each class that is
    held out of a folder without val/. `weights` may also name a folder that transformers saved, or a repository on its
    hub.
    """

    dataset: str = "bundled"
    val_fraction: float | None = None
    data_root: str | None = None
    bundled: BundledImages = field(default_factory=BundledImages)
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.dataset and self.dataset not in CLASSIFICATION and not Path(self.dataset).is_dir():
            known = f"dataset must be one of {', '.join(CLASSIFICATION)}, got {self.dataset!r}"
            raise UserError(f"{known}, which is no folder, either")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction must be above 0 and below 1, got {self.val_fraction!r}")
        if self.val_fraction is not None and self.dataset in CLASSIFICATION:
            raise UserError(f"val_fraction is for folders of class folders: leave it out with {self.dataset}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be from 0 to below 1, got {self.label_smoothing!r}")
        if self.max_tokens is not None:
            raise UserError(f"max_tokens is for models of texts: leave it out, got {self.max_tokens!r}")

    @property
    def folder(self) -> str:
        return self.data_root or located(f"data/{self.dataset}")

    def check_weights(self) -> None:
        if not is_hosted(self.weights):
            super().check_weights()

    @property
    def own(self) -> bool:
        """Return whether the data is a folder of the user."""
        return self.dataset not in CLASSIFICATION

    def overridden(self, options: Mapping[str, Any]) -> Self:
        smoothing = options.get("smoothing")
        config = super().overridden(options)
        return config if smoothing is None else replace(config, label_smoothing=smoothing)

    def check_data(self, where: str) -> None:
        if not self.dataset:
            raise UserError("give --dataset FOLDER, with a folder of images for each class, or train/ and val/ of such")
        for split in CLASSIFICATION.get(self.dataset, ()):
            LabelledImages(self.dataset, split, self.folder).check()

    def sizes(self, pretrained: Any) -> Any:
        """Return the sizes of the pretrained model, a dataclass with `image_size`, with the task's image size."""
        return replace(pretrained, image_size=self.image_res or pretrained.image_size)
