"""Files are whole or not there."""

import errno
import io
import os
import signal

import pytest
import torch

from sparsity.errors import ResourceError
from sparsity.files import check_writable, clear_leftovers, remove_leftovers, replacing, replacing_folder, write_atomic
from tests.processes import PATIENCE, held

HALF_WRITTEN = f"""
from {replacing.__module__} import replacing
with replacing(sys.argv[1]) as temporary, temporary.open("wb") as file:
    file.write(b"x" * 100_000)
    file.flush()
    hold()
"""


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for content in (b"first", b"second"):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    with pytest.raises(OSError, match=rf"^{tmp_path}/a.txt: .*No space left on device"), replacing(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


class Broken(io.BytesIO):
    """A file in whose third write something happens."""

    def __init__(self, error):
        super().__init__()
        self.error, self.times = error, 0

    def write(self, content):
        self.times += 1
        if self.times == 3:
            raise self.error
        return super().write(content)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("DataLoader worker (pid 3) is killed")], ids=repr)
def test_what_interrupts_torch_is_not_taken_for_a_full_disk(tmp_path, error):
    with pytest.raises(type(error)) as raised, replacing(tmp_path / "a.pt"):
        torch.save({"a": torch.ones(100)}, Broken(error))
    assert raised.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("file write failed")], ids=repr)
def test_a_full_disk_is_one_also_where_another_error_is_handled(tmp_path, error):
    with pytest.raises(ResourceError, match=r"a.pt: cannot be written"):
        try:
            raise RuntimeError("something else")
        except RuntimeError:
            with replacing(tmp_path / "a.pt"):
                torch.save({"a": torch.ones(100)}, Broken(error))


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_atomic(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.multiprocess
def test_a_kill_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "out" / "a.bin"
    write_atomic(path, b"old")
    with held(HALF_WRITTEN, path, log=tmp_path / "stderr.txt") as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(path.parent.iterdir())) == 2
    remove_leftovers(path)
    assert list(path.parent.iterdir()) == [path]


def test_leftovers_of_other_files_stay(tmp_path):
    for name in (".b.pt.tmp-1", ".a.pt.tmp-1", "a.pt", "a.pt.tmp-2"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.pt.tmp-1", "a.pt", "a.pt.tmp-2"]


def test_leftovers_of_all_files_and_folders_go_and_what_is_the_users_stays(tmp_path):
    with replacing(tmp_path / "a.png") as file, replacing_folder(tmp_path / "model") as folder:
        (folder / "part").write_bytes(b"half")
        for name in ("a.png", ".mine.tmp-1", ".tmp-1-0123abcd", "b.tmp-1-0123abcd", file.name + ".txt"):
            (tmp_path / name).touch()
        clear_leftovers(tmp_path)
        assert not file.exists() and not folder.exists()
        left = {path.name for path in tmp_path.iterdir()}
        file.touch()
        folder.mkdir()
    assert left == {"a.png", ".mine.tmp-1", ".tmp-1-0123abcd", "b.tmp-1-0123abcd", file.name + ".txt"}


def test_a_writable_folder_passes_and_nothing_is_made(tmp_path):
    check_writable(tmp_path / "x" / "y", "--output_dir")
    check_writable(tmp_path, "--output_dir")
    assert not list(tmp_path.iterdir())


def test_a_relative_folder_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("out/deep", "--output_dir")


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "f").touch()
    for folder in (tmp_path / "f", tmp_path / "f" / "x" / "y"):
        with pytest.raises(ValueError, match=f"--output_dir {folder}: {tmp_path}/f is not a folder"):
            check_writable(folder, "--output_dir")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a folder"):
        check_writable(tmp_path / "dangling", "--output_dir")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.geteuid() == 0:  # whom permissions do not stop; this file system takes files from nobody
        folder = "/proc/pruned"
    with pytest.raises(ValueError, match=f"--output_dir {folder}: cannot be written to"):
        check_writable(folder, "--output_dir")


@pytest.mark.multiprocess
def test_an_interrupt_while_writing_leaves_nothing(tmp_path):
    with held(HALF_WRITTEN, tmp_path / "out" / "a", log=tmp_path / "stderr.txt") as process:
        assert len(list((tmp_path / "out").iterdir())) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) != 0
    assert "KeyboardInterrupt" in (tmp_path / "stderr.txt").read_text()
    assert not list((tmp_path / "out").iterdir())


def test_a_file_is_readable_by_whom_the_umask_says(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("x")
        temporary.chmod(0o600)
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode
