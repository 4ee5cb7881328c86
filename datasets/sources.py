"""What a pruning run reads, as it stands in configs/<model>/prune_*.yaml. Needs no torch, so that it is checked at once."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """An annotation file in one of the public layouts and the folder of its images."""

    annotations: str
    images: str

    def check(self) -> None:
        """Raises FileNotFoundError, naming what is missing."""
        if not Path(self.annotations).is_file():
            raise FileNotFoundError(f"{self.annotations}: annotation file not found; README.md says how to get it")
        if not Path(self.images).is_dir():
            raise FileNotFoundError(f"{self.images}: image folder not found; README.md says how to get the images")


@dataclass(frozen=True)
class Evaluation:
    """Zero-shot retrieval: on `bundled_scenes` scenes that were never trained on, or on files in the COCO layout."""

    k_test: int = 256
    bundled_scenes: int = 0
    files: Files | None = None


@dataclass(frozen=True)
class PruneConfig:
    """Model, weights and calibration data of a pruning run.

    bundled: calibrate on the bundled scenes; otherwise on `general` (image-text pairs) and `region` files. batch_size:
    pairs in a general batch, images in a region batch. max_skipped: share of unreadable images that is tolerated.
    """

    model_config: str
    weights: str
    bundled: bool = False
    general: list[Files] = field(default_factory=list)
    region: list[Files] = field(default_factory=list)
    batch_size: int = 8
    workers: int = 1
    max_skipped: float = 0.01
    evaluation: Evaluation = field(default_factory=Evaluation)

    def check_calibration(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where calibration data is not configured or not there."""
        if self.bundled:
            return
        if not self.general and not self.region:
            raise ValueError(f"{where}: no calibration data: set bundled: true, or give general and region files")
        for files in (*self.general, *self.region):
            files.check()

    def check_evaluation(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where evaluation data is not configured or not there."""
        if self.evaluation.files:
            self.evaluation.files.check()
        elif not self.evaluation.bundled_scenes:
            raise ValueError(f"{where}: no evaluation data: set evaluation.bundled_scenes or evaluation.files")
