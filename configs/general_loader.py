"""`configs/prune/general_loader_<model>.yaml`: calibration data under the keys of the published prune.py. Needs no
torch, so that it is checked at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from sparsity.errors import UserError

DATASETS = ("cc3m", "sbu", "coco", "vg")
IN_DOMAIN = ("coco", "vg")  # the second source of a model that learns from no regions
ONE_VALUE = (  # keys that say what this project does in any case
    *("image_key", "caption_key", "dataset_key", "use_test_transform", "careful_hflip", "max_regions"),
    *("min_perc_in_image", "mask_prob", "max_masks", "skipgram_prb", "skipgram_size", "mask_whole_word"),
)
OF_THE_MODEL = {"image_res": "image_size", "patch_size": "patch_size", "max_tokens": "max_tokens"}


class Annotated(NamedTuple):
    """An annotation file and the folder of its images."""

    annotations: str
    images: str


@dataclass(frozen=True)
class GeneralLoader:
    """Annotation files and image folders, and how the published code reads them.

    {cc3m,sbu,coco,vg}_file: image-text pairs; {cc3m,sbu,coco,vg}_image_root: the images of the records with that
    "dataset", whichever file they stand in. region_files: images with described regions. root: ImageNet, for models
    that classify.

    image_res, patch_size, max_tokens: those of the model, if they are given. max_words: at least the model's
    max_tokens, where it changes nothing. The keys after these have one value here, which a file may repeat.
    """

    cc3m_file: str = ""
    cc3m_image_root: str = "images/cc3m/"
    sbu_file: str = ""
    sbu_image_root: str = "images/sbu/"
    coco_file: str = ""
    coco_image_root: str = "images/coco/"
    vg_file: str = ""
    vg_image_root: str = "images/vg/"
    region_files: list[str] = field(default_factory=list)
    root: str = ""
    batch_size: int | None = None
    image_res: int | None = None
    patch_size: int | None = None
    max_tokens: int | None = None
    max_words: int | None = None
    image_key: str = "image"
    caption_key: str = "caption"
    dataset_key: str = "dataset"
    use_test_transform: bool = False
    careful_hflip: bool = True
    max_regions: int = 5
    min_perc_in_image: float = 0.5
    mask_prob: float = 0.25
    max_masks: int = 8
    skipgram_prb: float = 0.2
    skipgram_size: int = 3
    mask_whole_word: bool = True

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ONE_VALUE and value != f.default:
                raise UserError(f"{f.name} is always {f.default!r} here, got {value!r}: leave it out")
        for name in ("batch_size", "image_res", "patch_size", "max_tokens", "max_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value!r}")
        if self.root and self._pairs(DATASETS):
            raise UserError("set root, for models that classify, or files of image-text pairs, not both")

    @property
    def roots(self) -> dict[str, str]:
        """The image folder of each dataset."""
        return {name: getattr(self, f"{name}_image_root") for name in DATASETS}

    @property
    def general(self) -> list[Annotated]:
        """The first source: all pairs where regions are the second one, else those of CC3M and SBU."""
        return self._pairs([name for name in DATASETS if self.region_files or name not in IN_DOMAIN])

    @property
    def region(self) -> list[Annotated]:
        """The second source: the regions, or the pairs of COCO and VG."""
        return [Annotated(file, self.vg_image_root) for file in self.region_files] or self._pairs(IN_DOMAIN)

    def _pairs(self, names: Any) -> list[Annotated]:
        files = [(getattr(self, f"{name}_file"), self.roots[name]) for name in names]
        return [Annotated(file, root) for file, root in files if file]

    def check_sizes(self, model: Mapping[str, Any], where: str) -> None:
        """Raise UserError where a size is another than in the model's configuration; `where` begins the message."""
        vision = model.get("vision")
        sizes = {**model, **(vision if isinstance(vision, dict) else {})}
        for key, name in OF_THE_MODEL.items():
            value = getattr(self, key)
            if value is not None and value != sizes.get(name, value):
                raise UserError(f"{where}: {key} is {value}, but {name} of the model is {sizes[name]}")
        longest = sizes.get("max_tokens", 0)
        if self.max_words is not None and self.max_words < longest:
            raise UserError(f"{where}: max_words must be at least the model's max_tokens = {longest}")
