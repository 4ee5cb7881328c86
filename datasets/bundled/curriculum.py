"""Pretraining batches of the bundled artwork: scenes, stage after stage, and single glyphs, with labels or noise."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from datasets.bundled.classification import BundledClassification
from datasets.bundled.glyphs import Glyphs
from datasets.bundled.scenes import BundledRegions, BundledScenes
from datasets.collate import collate, collate_regions
from datasets.loaders import loader
from datasets.place import ALONE, Place
from datasets.text import TextEncoder

REGION_SEED = 1000  # region scenes come from other random streams than the general ones


class Curriculum:
    """The steps of all stages, from any step on.

    Args:
        config: has `stages` (`configs.pretraining.Stage`), `workers` and `epoch_length`, the scenes in an epoch; a new
            epoch draws new ones.
        encode: of the captions.
        vision: has `image_size` and `patch_size`, in pixels.

    Raises:
        UserError: a stage that cannot be, before any step is done.
    """

    def __init__(self, config: Any, glyphs: Glyphs, encode: TextEncoder, vision: Any, *, seed: int):
        self.stages, self.workers, self.seed = tuple(config.stages), config.workers, seed
        self._sources = []
        for number, stage in enumerate(self.stages):
            options = {"side": vision.image_size, "max_objects": stage.max_objects}
            general = BundledScenes(glyphs, encode, config.epoch_length, seed=seed + number, **options)
            options |= {"seed": seed + REGION_SEED + number, "patch": vision.patch_size}
            self._sources.append((general, BundledRegions(glyphs, encode, config.epoch_length, **options)))

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def steps(self, start: int, place: Place = ALONE) -> Iterator[dict[str, Any]]:
        """Steps `start` to the last of one rank: {"sources": {"general": batch, "region": batch}, "objectives",
        "fused_pairs"}.
        """
        for number, stage, done in unfinished(self.stages, start):
            general, region = self._sources[number]
            order = {"seed": self.seed + number, "start": done, "stop": stage.steps, "workers": self.workers}
            order["place"] = place
            loaders = {"general": loader(general, stage.batch_size, collate, **order)}
            if stage.region_images:
                loaders["region"] = loader(region, stage.region_images, collate_regions, **order)
            for batches in zip(*loaders.values(), strict=True):
                yield {
                    "sources": dict(zip(loaders, batches, strict=True)),
                    "objectives": stage.objectives,
                    "fused_pairs": stage.fused_pairs,
                }


class LabelledCurriculum:
    """The steps of a training on the bundled glyphs and their classes, from any step on.

    Args:
        config: has `stages` (`configs.pretraining.LabelsStage`), `workers` and `epoch_length`, the images in an epoch.
        side: of the images, in pixels.
    """

    def __init__(self, config: Any, glyphs: Glyphs, side: int, *, seed: int):
        self.stages, self.workers, self.seed = tuple(config.stages), config.workers, seed
        options = {"length": config.epoch_length, "side": side}
        self._sources = [
            BundledClassification(glyphs, "train", seed=seed + number, strength=stage.strength, **options)
            for number, stage in enumerate(self.stages)
        ]

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def steps(self, start: int, place: Place = ALONE) -> Iterator[dict[str, Any]]:
        """Steps `start` to the last of one rank: {"image", "label", "fine_label"}."""
        for number, stage, done in unfinished(self.stages, start):
            order = {"seed": self.seed + number, "start": done, "stop": stage.steps, "workers": self.workers}
            yield from loader(self._sources[number], stage.batch_size, collate, place=place, **order)


class NoisedCurriculum:
    """The steps of a training on samples with noise, from any step on.

    Args:
        config: has `steps`, `batch_size` and `workers`.
        data: endless, as `datasets.bundled.generation.Noised`.
    """

    def __init__(self, config: Any, data: Dataset, *, seed: int):
        self.config, self.data, self.seed = config, data, seed

    def __len__(self) -> int:
        return self.config.steps

    def steps(self, start: int, place: Place = ALONE) -> Iterator[dict[str, Any]]:
        """Steps `start` to the last of one rank: {"image", "label", "noise", "time"}."""
        order = {"seed": self.seed, "start": start, "stop": self.config.steps, "workers": self.config.workers}
        yield from loader(self.data, self.config.batch_size, collate, place=place, **order)


def unfinished(stages: Sequence[Any], start: int) -> Iterator[tuple[int, Any, int]]:
    """(number, stage, steps of it that are done) of the stages that are not over at step `start`."""
    first = 0
    for number, stage in enumerate(stages):
        done, first = max(0, start - first), first + stage.steps
        if done < stage.steps:
            yield number, stage, done
