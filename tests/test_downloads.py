"""download_annots.sh and scripts/download_images.sh, in a copy of the repository's folder and without a network."""

import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
IMAGES, ANNOTATIONS = "scripts/download_images.sh", "download_annots.sh"
pytestmark = [
    pytest.mark.script,
    pytest.mark.skipif(
        not all(map(shutil.which, ("bash", "curl", "unzip", "tar"))), reason="bash, curl, unzip and tar are needed"
    ),
]


@pytest.fixture
def run(tmp_path):
    """Runs a script in a folder of its own; gdown is not installed there."""
    for script in (IMAGES, ANNOTATIONS):
        (tmp_path / "repo" / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, tmp_path / "repo" / script)
    (tmp_path / "repo" / "data").mkdir()
    (tmp_path / "bin").mkdir()

    def call(script, *arguments, answer="", **environment):
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **environment}
        command = [tmp_path / "repo" / script, *arguments]
        return subprocess.run(command, input=answer, env=environment, capture_output=True, text=True, timeout=PATIENCE)

    call.folder, call.bin = tmp_path / "repo", tmp_path / "bin"
    return call


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", [IMAGES, ANNOTATIONS])
def test_a_dry_run_lists_and_does_nothing(run, script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert os.access(ROOT / script, os.X_OK)
    before = files(run.folder)
    done = run(script, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "Licences:" in done.stdout and "https://" in done.stdout and "GB" in done.stdout
    assert files(run.folder) == before


def test_images_are_listed_with_official_addresses_and_sizes(run):
    lines = run(IMAGES, "--dry-run").stdout.splitlines()
    assert lines[0].split()[:4] == ["train2014", "13", "GB", "images/coco/train2014"]
    assert lines[0].endswith("  <-  http://images.cocodataset.org/zips/train2014.zip")
    assert lines[4].endswith("https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip")
    assert "To fetch: 49 GB. Disk space needed: 62 GB" in lines[6]
    assert len(run(IMAGES, "vg", "--dry-run").stdout.split("<-")) == 3


@pytest.mark.parametrize("script", [IMAGES, ANNOTATIONS])
def test_unknown_arguments_are_one_line(run, script):
    done = run(script, "--fast")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unknown argument --fast" in done.stderr


@pytest.fixture
def mirror(run, tmp_path):
    """The zip files of Visual Genome, small, and a `df` that sees enough space."""
    for name, folder, ids in (("images", "VG_100K", (1, 2)), ("images2", "VG_100K_2", (3,))):
        (tmp_path / "mirror").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "mirror" / f"{name}.zip", "w") as archive:
            archive.writestr(f"{folder}/", "")
            for i in ids:
                archive.writestr(f"{folder}/{i}.jpg", os.urandom(5000))
    space(run, kilobytes=10**9)
    return {"VG_URL": f"file://{tmp_path / 'mirror'}"}


def space(run, kilobytes):
    (run.bin / "df").write_text(f"#!/bin/sh\necho header\necho disk {kilobytes} 0 {kilobytes} 0% /\n")
    (run.bin / "df").chmod(0o755)


def test_images_are_fetched_resumed_and_not_fetched_again(run, mirror, tmp_path):
    downloads = run.folder / "images" / ".downloads"
    downloads.mkdir(parents=True)
    whole = (tmp_path / "mirror" / "images.zip").read_bytes()
    (downloads / "vg_part1.zip").write_bytes(whole[:3000])  # a download that was stopped
    done = run(IMAGES, "vg", answer="y\n", **mirror)
    assert done.returncode == 0, done.stderr
    images = {"images/vg/1.jpg", "images/vg/2.jpg", "images/vg/3.jpg"}
    stamps = {f"images/.downloads/vg_part{i}.done" for i in (1, 2)}
    assert {name for name in files(run.folder) if name.startswith("images")} == images | stamps
    assert "vg_part2: images/vg has 3 images" in done.stdout
    again = run(IMAGES, "vg")
    assert again.returncode == 0 and again.stdout.count("done") == 2 and "Fetch" not in again.stdout


def test_images_are_not_fetched_without_consent_space_or_source(run, mirror):
    assert run(IMAGES, "vg", answer="n\n", **mirror).returncode == 1
    silent = run(IMAGES, "vg", **mirror)
    assert silent.returncode == 2 and "give --yes" in silent.stderr
    gone = run(IMAGES, "vg", "--yes", VG_URL=mirror["VG_URL"] + "/nowhere")
    assert gone.returncode == 1 and "could not be fetched" in gone.stderr
    space(run, kilobytes=25_000_000)  # 26 GB are needed
    full = run(IMAGES, "vg", "--yes", **mirror)
    assert full.returncode == 1 and "26 GB are needed and 25 GB are free" in full.stderr
    assert not list(run.folder.rglob("*.jpg"))


def archive(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            content = b"[]" if info.isreg() else b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def test_annotations_put_there_by_hand_are_unpacked(run):
    archive(run.folder / "pretrain.tar.gz", "data/pretrain/cc3m_pretrain.json", "./data/pretrain/._x")
    archive(run.folder / "data" / ".archives" / "finetune.tar.gz", "./data/finetune/itr/coco_test.json")
    done = run(ANNOTATIONS, "--yes")
    assert done.returncode == 0, done.stderr
    assert "gdown is not installed" in done.stdout and done.stdout.count("unpacked; it can be removed") == 2
    unpacked = {"data/pretrain/cc3m_pretrain.json", "data/finetune/itr/coco_test.json"}
    archives = {"pretrain.tar.gz", "data/.archives/finetune.tar.gz"}
    assert files(run.folder) == unpacked | archives | {IMAGES, ANNOTATIONS}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (["data/a.json", "../b"], "has the path ../b, which leads out"),
        (["data/a.json", "/etc/b"], "has the path /etc/b, which leads out"),
        (["data/a.json", "data/../../b"], "leads out"),
        ([link("data/out", "/etc"), "data/out/b"], "neither a file nor a folder"),
        (["data/a.json", "prune.py"], "has prune.py, which is not below data/"),
        (["data/a.json", "data/vocab/bert_vocab.txt"], "which the repository brings itself"),
    ],
)
def test_archives_that_would_write_elsewhere_are_refused(run, members, reason):
    archive(run.folder / "bad.tar.gz", *members)
    archive(run.folder / "good.tar.gz", "data/good.json")
    done = run(ANNOTATIONS, "--yes")
    assert done.returncode == 1
    assert done.stderr.startswith("download_annots.sh: ./bad.tar.gz: ") and done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert files(run.folder) == {"bad.tar.gz", "good.tar.gz", "data/good.json", IMAGES, ANNOTATIONS}


def test_damaged_archives_are_refused(run):
    (run.folder / "bad.tar.gz").write_bytes(b"no archive")
    done = run(ANNOTATIONS, "--yes")
    assert done.returncode == 1 and "damaged or not complete" in done.stderr
    space(run, kilobytes=1)
    archive(run.folder / "bad.tar.gz", "data/a.json")
    assert "needs more than" in run(ANNOTATIONS, "--yes").stderr


def test_annotations_are_fetched_with_gdown(run):
    archive(run.folder.parent / "source.tar.gz", "data/pretrain/cc3m_pretrain.json")
    gdown = run.bin / "gdown"
    gdown.write_text(
        f"""#!/bin/sh
        [ "$1" != --help ] || {{ echo --folder; exit 0; }}
        echo "$@" >{run.folder.parent}/arguments
        cp {run.folder.parent}/source.tar.gz data/.archives/a.tar.gz"""
    )
    gdown.chmod(0o755)
    assert run(ANNOTATIONS, answer="y\n").returncode == 0
    assert (run.folder / "data" / "pretrain" / "cc3m_pretrain.json").is_file()
    arguments = (run.folder.parent / "arguments").read_text().split()
    assert arguments[:2] == ["--folder", "--continue"] and arguments[-2:] == ["-O", "data/.archives"]
    assert arguments[2].startswith("https://drive.google.com/drive/folders/")


def test_without_gdown_and_archives_it_says_what_to_do(run):
    done = run(ANNOTATIONS, "--yes")
    assert done.returncode == 1 and "pip install gdown" in done.stdout and "nothing to unpack" in done.stderr
