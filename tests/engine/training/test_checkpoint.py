"""Training checkpoints, and how configurations are told apart."""

import os

import pytest
import torch

from engine.training.checkpoint import differences, load_checkpoint, save_checkpoint


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_round_trip(tmp_path):
    state = {"step": 3, "weights": {"a": torch.arange(4.0)}, "identity": {"lr": 1e-3, "betas": (0.9, 0.98), "x": None}}
    save_checkpoint(tmp_path / "deep" / "last.pt", state)
    loaded = load_checkpoint(tmp_path / "deep" / "last.pt", ("step", "weights"))
    assert torch.equal(loaded["weights"]["a"], state["weights"]["a"])
    assert loaded["identity"] == state["identity"] and loaded["step"] == 3


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path / "last.pt", {"step": lambda: 2})
    assert load_checkpoint(tmp_path / "last.pt") == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("whole.pt", {"step": 1, "weights": torch.zeros(1000)})
    torch.save({"step": Code()}, "code.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content in (("empty.pt", b""), ("junk.pt", b"hello" * 99), ("cut.pt", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
    for name in ("empty.pt", "junk.pt", "cut.pt", "code.pt"):
        with pytest.raises(ValueError, match=f"^{name}: not a readable checkpoint [^\n]*$"):
            load_checkpoint(name)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError, match="nothing.pt: checkpoint not found"):
        load_checkpoint("nothing.pt")
    with pytest.raises(ValueError, match="whole.pt: not a checkpoint of .* it has no 'model', 'optimizer'"):
        load_checkpoint("whole.pt", ("step", "model", "optimizer"))
    save_checkpoint("list.pt", [1])
    with pytest.raises(ValueError, match="it has no 'step'"):
        load_checkpoint("list.pt", ("step",))


def test_differences_name_the_leaf():
    old = {"seed": 1, "training": {"lr": 0.1, "stages": [{"steps": 5}, {"steps": 6}]}, "gone": 1}
    new = {"seed": 1, "training": {"lr": 0.2, "stages": [{"steps": 5}, {"steps": 7}]}, "fresh": 2}
    assert differences(old, new) == [
        "training.lr 0.1 -> 0.2",
        "training.stages.1.steps 6 -> 7",
        "gone 1 -> None",
        "fresh None -> 2",
    ]
    assert differences(old, old) == [] and differences({"b": (1, 2)}, {"b": [1, 2]}) == []
