"""pack.py: what is quantised is carried, and what --dtype would lose is said and refused."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pack
from engine.export import save_state, save_weights
from models.checkpoint import read_weights, stored_weights
from sparsity.bits import MadeTensors, Recipe
from sparsity.errors import UserError
from sparsity.pattern import NM
from tests.processes import PATIENCE, PLAIN, ROOT


@pytest.fixture
def checkpoint(tmp_path):
    def write(**tensors):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
        return [str(tmp_path / "a.safetensors"), str(tmp_path / "p.safetensors")]

    return write


@pytest.mark.parametrize("options", [[], ["--dtype", "float16"], ["--unpack"]])
def test_float8_is_as_it_was(checkpoint, options):
    weight = torch.randn(16, 16).to(torch.float8_e4m3fn)
    given = checkpoint(w=weight, b=torch.ones(3))
    pack.main([*given, *options])
    found = read_weights(given[1])
    assert found["w"].dtype == weight.dtype and torch.equal(found["w"].view(torch.uint8), weight.view(torch.uint8))
    assert found["b"].dtype == (torch.float16 if "float16" in options else torch.float32)


def test_what_a_type_cannot_hold_is_refused_unless_it_is_allowed(checkpoint, tmp_path):
    given = checkpoint(large=torch.tensor([1e5, 1.0]), small=torch.tensor([[1e-9, 0.0, 1.0, 0.0]]))
    half = [*given, "--dtype", "float16"]
    with pytest.raises(UserError, match=r"a.safetensors: 1 values vanish .* in small: .*--allow_loss vanished or all"):
        pack.main(half)
    with pytest.raises(UserError, match=r"a.safetensors: 1 values overflow .* in large"):
        pack.main([*half, "--allow_loss", "vanished"])
    assert not (tmp_path / "p.safetensors").exists()
    pack.main([*half, "--allow_loss", "all"])
    found = read_weights(given[1])
    assert found["large"].tolist() == [float("inf"), 1.0] and found["small"].tolist() == [[0.0, 0.0, 1.0, 0.0]]
    pack.main([*given, "--dtype", "bfloat16"])
    with pytest.raises(UserError, match="--allow_loss is for --dtype"):
        pack.main([*given, "--allow_loss", "all"])


def test_saved_weights_keep_their_types_unless_one_is_given(tmp_path):
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    model.register_buffer("deep", torch.tensor([1e300], dtype=torch.float64))
    path = save_weights(model, tmp_path / "w.safetensors")
    assert {str(t.dtype) for t in load_file(path).values()} == {"torch.bfloat16", "torch.float64"}
    with pytest.raises(UserError, match=r"w.safetensors: 1 values overflow .* as float32, in deep"):
        save_weights(model, path, torch.float32)
    save_weights(model, path, torch.float32, allowed=("overflowed",))
    assert {t.dtype for t in load_file(path).values()} == {torch.float32}


def pruned(shape: tuple[int, int], seed: int, kind: str) -> torch.Tensor:
    """Return a matrix in float16 with zeros: 2:4, or 90 % anywhere."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scores = weight.abs()
    kept = NM(2, 4).keep(scores) if kind == "2:4" else scores >= scores.flatten().kthvalue(int(0.9 * scores.numel()))[0]
    return (weight * kept).half()


@pytest.mark.parametrize(("kind", "most"), [("2:4", 0.57), ("90 %", 0.17)])
def test_what_packed_weights_take_of_dense_ones(checkpoint, capsys, kind, most):
    tensors = {f"{i}.weight": pruned((256, 512), i, kind) for i in range(3)} | {"norm": torch.ones(512).half()}
    given = checkpoint(**tensors)
    pack.main(given)
    told = capsys.readouterr().out
    share, whole = map(float, re.findall(r"(\d\.\d+) of the", told))
    assert share <= most and share < whole < share + 0.01
    size, dense = (sum(t.nbytes for n, t in load_file(path).items() if n != "norm") for path in given[::-1])
    assert abs(share - size / dense) <= 0.0005
    again = read_weights(given[1])
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_folder_of_shards_is_packed_as_one_file(tmp_path, suffix):
    tensors = {f"{i}.weight": pruned((16, 32), i, "2:4") for i in range(4)}
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    (tmp_path / "source").mkdir()
    places = {}
    for i, own in enumerate((["0.weight", "1.weight"], ["2.weight", "3.weight"]), 1):
        file = f"{stem}-0000{i}-of-00002{suffix}"
        save = save_file if suffix == ".safetensors" else torch.save
        save({name: tensors[name] for name in own}, tmp_path / "source" / file)
        places |= dict.fromkeys(own, file)
    index = tmp_path / "source" / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for source in (index.parent, index):
        pack.main([str(source), str(tmp_path / "p.safetensors")])
        pack.main([str(tmp_path / "p.safetensors"), str(tmp_path / "dense.safetensors"), "--unpack"])
        dense = load_file(tmp_path / "dense.safetensors")
        assert dense.keys() == tensors.keys() and all(torch.equal(dense[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("packed", [True, False])
def test_one_tensor_at_a_time_is_alive(tmp_path, packed):
    alive, most = weakref.WeakSet(), []

    def make(seed: int) -> torch.Tensor:
        tensor = pruned((16, 32), seed, "2:4")
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    recipes = {f"{i}.weight": Recipe(torch.float16, (16, 32), lambda i=i: make(i)) for i in range(9)}
    save_state(MadeTensors(recipes), tmp_path / "w.safetensors", packed=packed)
    assert len(most) >= len(recipes) and max(most) <= 2
    again = stored_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(again[f"{i}.weight"], make(i)) for i in range(9))


WATCHED = """
import re, sys, threading
from pathlib import Path
import pack, engine.deployment.packed_files, models.checkpoint, sparsity.learned.checkpoint

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while not done.wait(0.003):
        peak[0] = max(peak[0], anonymous())

before, peak, done = anonymous(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
pack.main(sys.argv[1:])
done.set()
watcher.join()
print("grown by", peak[0] - before)
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="RssAnon is read from /proc")
@pytest.mark.parametrize("unpack", [False, True])
def test_memory_is_that_of_a_layer_and_not_of_the_file(checkpoint, unpack):
    layers, layer = 48, 2 * 512 * 1024  # bytes of each
    given = checkpoint(**{f"{i}.weight": pruned((512, 1024), i % 4, "2:4") for i in range(layers)})
    if unpack:
        pack.main(given)
        given = [given[1], given[1].replace("p.s", "u.s"), "--unpack"]
    environment = PLAIN | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}  # what is freed goes back at once
    command = [sys.executable, "-c", WATCHED, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    assert 0 < grown < layers * layer / 2
