import dataclasses
import io
import json
import re
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.loading import load_config
from configs.pruning import PruneConfig
from configs.shard_names import shard_paths
from configs.sources import Files
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from datasets.calibration.data_kinds import Calibration, proportional
from datasets.collate import Skipped, SkippedImages, collate
from datasets.images import FORMATS
from datasets.pairs.pretraining import ImageTextDataset
from datasets.pairs.shards import ShardBatches, ShardDataset, shard_loader
from datasets.pairs.tars import count_samples, read_shard
from datasets.place import Place
from datasets.transforms import TrainTransform
from sparsity.errors import UserError
from tests.processes import PATIENCE

pytestmark = pytest.mark.script

COUNTS = (5, 9, 2, 0, 11)  # samples of the shards
TOTAL = sum(COUNTS)


def png(number):
    """An image whose first pixel is its number."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    pixels[0, 0] = number
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, samples, stats=True):
    """A shard of (key, files) pairs; files maps extensions to bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    if stats:
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": 99, "successes": len(samples)}))
    return path


def sample(number):
    caption = f"a dog left of {number} cats"
    meta = json.dumps({"caption": caption, "status": "success"}).encode()
    return f"{number:09d}", {"png": png(number), "txt": caption.encode(), "json": meta}


@pytest.fixture
def shards(tmp_path):
    number = iter(range(TOTAL))
    for i, count in enumerate(COUNTS):
        samples = [sample(next(number)) for _ in range(count)]
        write_shard(tmp_path / "cc3m" / f"{i:05d}.tar", samples, stats=i % 2)
    return str(tmp_path / "cc3m" / "{00000..00004}.tar")


def first_pixel(image, rng):
    return torch.tensor(image.getpixel((0, 0))[0])


def dataset(images, text, transform=first_pixel, seed=0, **options):
    return ShardDataset([images], transform, text, seed=seed, **{"streams": 3, "block": 4} | options)


def numbers(batches):
    return [batch["image"].tolist() for batch in batches]


def one_pass(data, batch_size=2, rank=0, world_size=1, workers=0, start=0, epochs=1):
    batches = epochs * ShardBatches(data, batch_size, collate).batches
    stop = len(range(rank, batches, world_size))
    split = {"place": Place(rank, world_size), "workers": workers, "start": start}
    loader = shard_loader(data, batch_size, collate, stop=stop, **split)
    read = numbers(loader)
    assert len(read) == len(loader) == max(0, stop - start)
    return read


@pytest.mark.parametrize("streams", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_a_pass_reads_every_sample_once(shards, text, streams, batch_size):
    read = one_pass(dataset(shards, text, streams=streams), batch_size)
    assert sorted(sum(read, [])) == list(range(TOTAL))
    assert list(map(len, read))[:-1] == [batch_size] * (len(read) - 1)  # all are full, but for the last


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_do_not_depend_on_workers_or_ranks(shards, text, workers, world_size):
    expected = one_pass(dataset(shards, text))
    data = dataset(shards, text)
    ranks = [one_pass(data, rank=rank, world_size=world_size, workers=workers) for rank in range(world_size)]
    assert [ranks[b % world_size][b // world_size] for b in range(len(expected))] == expected


def test_workers_draw_the_same(shards, text):
    data = dataset(shards, text, TrainTransform(8))
    alone, helped = (list(shard_loader(data, 3, collate, stop=9, workers=workers)) for workers in (0, 2))
    assert same(alone, helped)


def test_passes_differ_in_order_and_hold_the_same(shards, text):
    data = dataset(shards, text)
    batches = ShardBatches(data, 2, collate).batches
    read = one_pass(data, epochs=2, workers=2)
    assert read == one_pass(data, epochs=2)
    assert read[:batches] == one_pass(data) != read[batches:]
    assert sorted(sum(read[batches:], [])) == list(range(TOTAL))
    assert one_pass(dataset(shards, text, seed=1)) != one_pass(data)


@pytest.mark.parametrize("start", [1, 4, 13, 19])
def test_a_run_goes_on_where_it_stopped(shards, text, start):
    data = dataset(shards, text)
    assert one_pass(data, start=start, epochs=2, workers=start % 2) == one_pass(data, epochs=2)[start:]


def test_items_are_those_of_image_files(shards, tmp_path, text):
    """A pass over shards gives what `ImageTextDataset` gives for the same images and captions in the same order."""
    records = []
    for shard in shard_paths(shards):
        for item in read_shard(shard):
            path = tmp_path / "files" / f"{len(records)}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(item.image)
            records.append({"image": path.name, "caption": item.caption})
    (tmp_path / "list.json").write_text(json.dumps(records))
    source = (tmp_path / "list.json", tmp_path / "files")
    files = ImageTextDataset([source], TrainTransform(8), text, seed=3)
    data = dataset(shards, text, TrainTransform(8), seed=3)
    assert len(data) == len(files) == TOTAL
    for epoch in range(2):
        for index, item in data.read(epoch, 0):
            a, b = data.item(epoch, index, item), files[epoch * TOTAL + index]
            assert all(torch.equal(a[name], b[name]) for name in b)


def test_captions_come_from_the_text_or_the_json_file(tmp_path):
    files = [{"txt": b" a cat\n"}, {"json": b'{"caption": "a dog"}'}, {"json": b'{"caption": null}'}, {"json": b"{"}]
    path = write_shard(tmp_path / "0.tar", [(str(i), {"jpg": b"-", **more}) for i, more in enumerate(files)])
    assert [item.caption for item in read_shard(path)] == ["a cat", "a dog", None, None]


def test_unreadable_images_are_skipped_and_listed(tmp_path, text):
    samples = [sample(i) for i in range(6)]
    samples[2][1]["png"] = samples[2][1]["png"][:40]
    del samples[3][1]["png"]
    write_shard(tmp_path / "00000.tar", samples)
    data = dataset(str(tmp_path), text)
    account = SkippedImages(tmp_path / "skipped.txt", len(data), max_skipped=0.5)
    loader = shard_loader(data, 2, collate, stop=3, workers=1)
    assert sorted(sum(numbers(account.watch(loader)), [])) == [0, 1, 4, 5]
    name = f"{tmp_path}/00000.tar/000000002.png"
    assert sorted((tmp_path / "skipped.txt").read_text().splitlines()) == [
        f"{name}\tit is damaged, or no image in one of the formats {', '.join(FORMATS)}",
        f"{tmp_path}/00000.tar/000000003\tthe shard has no image for this sample",
    ]
    with pytest.raises(ValueError, match="more than max_skipped = 0.01"):
        list(SkippedImages(tmp_path / "skipped.txt", len(data)).watch(loader))
    assert isinstance(data.item(0, 0, next(read_shard(tmp_path / "00000.tar"))._replace(image=b"")), Skipped)


def test_shards_are_named_by_braces_globs_folders_and_files(shards, tmp_path):
    folder = tmp_path / "cc3m"
    paths = [folder / f"{i:05d}.tar" for i in range(5)]
    assert shard_paths(shards) == shard_paths(str(folder / "*.tar")) == shard_paths(str(folder)) == paths
    assert shard_paths(str(folder / "{00003,0000[01]}.tar")) == [paths[3], paths[0], paths[1]]
    assert shard_paths(str(paths[2])) == [paths[2]]


def test_counts_are_found_without_statistics(shards):
    for path, count in zip(shard_paths(shards), COUNTS, strict=True):
        path.with_name(f"{path.stem}_stats.json").unlink(missing_ok=True)
        assert count_samples(path) == count == len(list(read_shard(path)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("{00000..00007}.tar", "00005.tar: shard not found, nor 2 more of the 8 of .*img2dataset"),
        ("00009.tar", "00009.tar: shard not found; img2dataset"),
        ("{00000..00004.tar", "unbalanced braces"),
        ("{00000,00000}.tar", "00000.tar: named twice"),
        ("{0..99999999999}.tar", "stand for more than 100,000 names"),
        (
            "{{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b}{a,b},c}.tar",
            "stand for",
        ),
        ("*_stats.json", "00001_stats.json: expected .tar files"),
        ("cc*.tar", "no shard .* found"),
        ("", "no sample in these shards"),
    ],
)
def test_missing_shards_are_named(shards, tmp_path, text, images, message):
    folder = tmp_path / "cc3m"
    if not images:  # a shard of which nothing could be downloaded
        folder = tmp_path / "empty"
        write_shard(folder / "0.tar", [])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        dataset(str(folder / images), text)
    assert "\n" not in str(error.value)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def overwrite_header(path, file):
    """Overwrite the header of the file of that number in the shard."""
    with tarfile.open(path) as tar:
        at = tar.getmembers()[file].offset
    content = bytearray(path.read_bytes())
    content[at : at + 512] = b"\7" * 512
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path, 1000), "the end of this tar file is missing"),
        (lambda path: cut(path, 3 * 512), "the end of this tar file is missing"),
        (lambda path: path.write_bytes(b""), "the end of this tar file is missing"),
        (lambda path: path.write_bytes(b"<html>" * 500), "not an uncompressed tar file"),
        (lambda path: overwrite_header(path, 0), "not an uncompressed tar file"),
        (lambda path: overwrite_header(path, 4), r"damaged tar file \(no header at byte \d+\)"),
        (lambda path: write_shard(path, [("../../a", sample(1)[1])]), "leads out of the archive"),
        (lambda path: write_shard(path, [("/a", sample(1)[1])], stats=False), "leads out of the archive"),
        (lambda path: write_shard(path, [("a", {"jpg": b""})]), "no image|no caption"),
        (lambda path: write_shard(path, [("a", {"txt": b"a cat"})]), "no image"),
        (lambda path: path.with_name("00000_stats.json").write_text("[]"), "_stats.json: expected img2dataset's"),
    ],
)
def test_damaged_shards_are_refused_at_the_start(shards, tmp_path, text, damage, message):
    path = tmp_path / "cc3m" / "00000.tar"
    damage(path)
    with pytest.raises(ValueError, match=f"{path.with_suffix('')}.*{message}") as error:
        dataset(shards, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("successes", [4, 6])
def test_statistics_that_are_wrong_are_found_out(shards, tmp_path, text, successes):
    (tmp_path / "cc3m" / "00000_stats.json").write_text(json.dumps({"successes": successes}))
    with pytest.raises(ValueError, match=f"00000.tar: does not hold the {successes} samples"):
        one_pass(dataset(shards, text))


def test_damage_that_shows_while_reading_names_the_shard(tmp_path, text):
    path = write_shard(tmp_path / "00000.tar", [sample(i) for i in range(8)])
    overwrite_header(path, 10)  # the stream ends early
    with pytest.raises(ValueError, match="00000.tar"):
        one_pass(dataset(str(path), text), workers=1)
    write_shard(path, [sample(0), sample(1), ("1/../../x", sample(2)[1])])
    with pytest.raises(ValueError, match="leads out of the archive"):
        one_pass(dataset(str(path), text))
    write_shard(path, [sample(0), sample(1), sample(1)])
    with pytest.raises(ValueError, match=r"damaged tar file \(.*duplicate file name"):
        one_pass(dataset(str(path), text))


@pytest.mark.parametrize("options", [{"streams": 0}, {"block": 0}])
def test_options_out_of_range(shards, text, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1, got 0"):
        dataset(shards, text, **options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"start": -1}, {"stop": -1}])
def test_batches_out_of_range(shards, text, options):
    with pytest.raises(ValueError, match="must"):
        ShardBatches(dataset(shards, text), **{"batch_size": 2, "collate": collate} | options)


@pytest.fixture(params=["shards", "mixed"])
def config(request, shards, tmp_path):
    """Shards alone, or beside annotated images, and regions."""
    export_public(tmp_path / "public", 12, load_glyphs(), side=32)
    pairs, regions = (Files(str(tmp_path / f"public/data/pretrain/{name}.json"), str(tmp_path / "public/images"))
                      for name in ("sbu_pretrain", "vg_regions"))  # fmt: skip
    general = [Files(images=shards)] + ([pairs] if request.param == "mixed" else [])
    return PruneConfig("m.yaml", "random", general=general, region=[regions], batch_size=2, workers=0)


def calibration(config, text, tmp_path, num_batches=5, **place):
    vision = SimpleNamespace(image_size=32, patch_size=16)
    return Calibration(config, text, vision, tmp_path, num_batches=num_batches, seed=0, **place)


def general_and_region(batches):
    parts = [], []
    for batch in batches:
        parts["idx_to_group_img" in batch].append(batch)
    return parts


def same(a, b):
    pairs = zip(a, b, strict=True)
    return all(
        x.keys() == y.keys() and all(torch.equal(x[name].to("cpu"), y[name].to("cpu")) for name in x) for x, y in pairs
    )


def test_calibration_reads_shards(config, text, tmp_path):
    config.check_calibration("c.yaml")
    data = calibration(config, text, tmp_path)
    batches = list(data)
    assert len(batches) == len(data) == 10
    general, region = general_and_region(batches)
    assert len(general) == len(region) == 5
    assert {tuple(batch["image"].shape) for batch in batches} == {(2, 3, 32, 32)}
    assert all(batch["text_ids"].shape == batch["text_atts"].shape for batch in batches)
    helped = calibration(dataclasses.replace(config, workers=2), text, tmp_path)
    assert same(list(helped), batches)


def test_ranks_share_the_calibration_batches(config, text, tmp_path):
    def sums(batches):
        return sorted(float(batch["image"].double().sum()) for batch in batches)

    whole = list(calibration(config, text, tmp_path))
    parts = [list(calibration(config, text, tmp_path, place=Place(rank, 2))) for rank in range(2)]
    assert sums(whole) == sums(parts[0] + parts[1])
    assert abs(len(parts[0]) - len(parts[1])) <= 3  # one for each of the sources


def test_the_shorter_source_ends_the_calibration(config, text, tmp_path):
    assert len(calibration(config, text, tmp_path, num_batches=100)) == 2 * 6  # 12 images with regions
    only = dataclasses.replace(config, region=[])
    pairs = 12 if len(config.general) == 2 else 0
    assert len(list(calibration(only, text, tmp_path, num_batches=100))) == TOTAL // 2 + pairs // 2


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [(10, [3], [10]), (10, [1, 1], [5, 5]), (7, [5, 3], [4, 3]), (1, [2, 9], [0, 1]), (0, [4, 4], [0, 0])],
)
def test_shares_are_proportional(total, sizes, shares):
    assert proportional(total, sizes) == shares


def test_configurations_name_shards(tmp_path):
    path = tmp_path / "c.yaml"
    head = "model_config: m.yaml\nweights: random\n"
    path.write_text(head + 'general:\n  - {images: "images/cc3m/{00000..00003}.tar"}\n')
    assert load_config(path, PruneConfig).general == [Files("", "images/cc3m/{00000..00003}.tar")]
    for content, message in (
        ('general: [{annotations: a.json, images: "i/*.tar"}]', r"c.yaml: general\[0\]: images i/\*.tar are shards"),
        ("general: [{annotations: a.json}]", r"c.yaml: general\[0\]: images must name a folder, or shards"),
        ("region: [{images: i}]", "c.yaml: region files must name annotations: shards have no regions"),
        ("evaluation: {files: {images: i}}", "c.yaml: evaluation: files must name annotations"),
    ):
        path.write_text(head + content)
        with pytest.raises(ValueError, match=message):
            load_config(path, PruneConfig)
    missing = PruneConfig("m.yaml", "random", general=[Files(images=str(tmp_path / "{0..3}.tar"))])
    with pytest.raises(FileNotFoundError, match=r"0.tar: shard not found, nor 3 more of the 4 of .*; img2dataset"):
        missing.check_calibration("c.yaml")


@pytest.mark.script
def test_webdataset_leaves_our_packages_alone_and_configurations_need_no_torch():
    code = """
import sys
import configs.pruning
assert "torch" not in sys.modules and "webdataset" not in sys.modules
import os, random, signal, logging
before = dict(os.environ), list(sys.path), random.getstate(), signal.getsignal(2), list(logging.root.handlers)
import datasets.pairs.shards, webdataset
assert before == (dict(os.environ), sys.path, random.getstate(), signal.getsignal(2), logging.root.handlers)
assert datasets.__file__.startswith(os.getcwd()) and "datasets.pairs.shards" in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"txt": b"caf\xe9"}, r"its caption \(.txt\) is not UTF-8"),
        ({"txt": b" \n"}, "'caption' must not be empty"),
        ({"json": b'{"caption": ""}'}, "'caption' must not be empty"),
        ({"json": b'{"caption": "\\ud800"}'}, "'caption' has half a character"),
        ({"json": b'{"caption": [1]}'}, "'caption' must be a text"),
        ({"json": b"[" * 200_000}, "its .json is not JSON"),
        ({"json": b"[3]"}, "no caption"),
        ({}, "no caption"),
    ],
)
def test_captions_that_are_none_are_named(tmp_path, text, files, told):
    """The first sample's stops a run at its start, a later one is skipped."""
    good, bad = sample(0), ("bad", {"png": png(1), **files})
    write_shard(tmp_path / "first.tar", [bad, good])
    with pytest.raises(UserError, match=rf"first.tar/bad.png: .*{told}"):
        dataset(str(tmp_path / "first.tar"), text)
    (tmp_path / "first.tar").unlink()
    write_shard(tmp_path / "later.tar", [good, bad])
    items = dict(dataset(str(tmp_path / "later.tar"), text).read(0, 0))
    (item,) = [dataset(str(tmp_path / "later.tar"), text).item(0, 1, items[1])]
    assert isinstance(item, Skipped) and item.path.endswith("later.tar/bad.png") and re.search(told, item.reason)


@pytest.mark.parametrize(
    "content", ['{"successes": "3"}', '{"successes": -1}', '{"successes": 2.5}', '{"successes": true}']
)
def test_counts_that_are_none(tmp_path, content):
    write_shard(tmp_path / "0.tar", [sample(0)])
    (tmp_path / "0_stats.json").write_text(content)
    with pytest.raises(UserError, match="0_stats.json: expected img2dataset's JSON with 'successes'"):
        count_samples(tmp_path / "0.tar")


@pytest.mark.parametrize(
    ("streams", "workers", "world_size", "told"),
    [
        (3, 0, 1, None),
        (4, 2, 2, None),
        (3, 2, 1, "streams: 3 stretches of the shards for 2 processes (1 devices x 2 workers)"),
        (6, 2, 2, "make streams a multiple of 4"),
    ],
)
def test_a_stretch_that_is_read_twice_is_told(shards, text, caplog, streams, workers, world_size, told):
    for rank in range(world_size):
        split = {"workers": workers, "place": Place(rank, world_size)}
        shard_loader(dataset(shards, text, streams=streams), 1, collate, stop=1, **split)
    assert [told in message for message in caplog.messages] == [True] * (told is not None)
