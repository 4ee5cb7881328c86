"""Free memory of the system and of a container."""

from engine.pruning import free_memory
from tests.toys import layers, view_of


def test_a_container_s_limit_counts_and_cached_files_do_not(tmp_path, monkeypatch):
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 1\ninactive_file 50\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    assert free_memory.free_memory(view_of(layers((2, 3)))).host == 350
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  4 kB\n")
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    found = free_memory.free_memory(view_of(layers((2, 3))))
    assert (found.device, found.host) == (0, 4096)
