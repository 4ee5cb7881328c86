"""Repositories of a hub whose weights are sharded, from a small hub of the tests' own."""

import hashlib
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open

import prune
from models.checkpoint import find_weights, read_weights
from models.external import model as external
from sparsity.errors import MissingFileError, UserError
from tests import tiny_models

pytestmark = pytest.mark.script
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Answer GET and HEAD of /owner/name/resolve/revision/file with the files of a folder, and say which there are."""

    def __init__(self, folder: Path, asked: list[str], *args):
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        path = self._answer()
        if path:
            self.asked.append(path.name)
            self.wfile.write(path.read_bytes())

    def _answer(self) -> Path | None:
        if self.path.startswith("/api/models/me/tiny/"):
            files = sorted(self.folder.iterdir())
            there = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files]
            told = {"id": "me/tiny", "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            content = json.dumps(there if "/tree/" in self.path else told).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return None
        repository, found, rest = self.path.partition("/resolve/")
        file = rest.partition("/")[2]  # of any revision
        path = self.folder / file if found else None
        there = repository == "/me/tiny" and path is not None and path.is_file()
        self.send_response(200 if there or self.path == "/" else 404)
        content = path.read_bytes() if there and path else b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if there:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
        self.end_headers()
        return path if there else None

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve `tmp_path / "served"` as the repository me/tiny; the names of the files that were fetched."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tmp_path / "served", asked)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield asked
        server.shutdown()


@pytest.fixture
def served(tmp_path):
    """Save a model in bfloat16 in several files, and return them."""
    torch.manual_seed(0)
    model = tiny_models.clip().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "served", max_shard_size="60KB")
    shards = sorted(path.name for path in (tmp_path / "served").glob("*.safetensors"))
    assert len(shards) > 1
    return shards


def test_shards_are_fetched_once(hub, served, tmp_path):
    path = find_weights("me/tiny")
    assert path.name == "model.safetensors.index.json" and sorted(hub) == sorted([path.name, *served])
    expected = read_weights(tmp_path / "served")
    found = read_weights(path)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    hub.clear()
    assert find_weights("me/tiny") == path and not hub


def test_a_name_without_weights_is_one_line(hub, tmp_path):
    (tmp_path / "served").mkdir()
    with pytest.raises(
        MissingFileError, match="me/tiny: has no weights; expected model.safetensors or pytorch_model.bin"
    ):
        find_weights("me/tiny")
    with pytest.raises(UserError, match="me/other: "):
        find_weights("me/other")


def test_a_model_of_the_hub_comes_back_in_its_shards_and_type(hub, served, tmp_path):
    out = tmp_path / "out"
    prune.main(
        ["-m", "hf:me/tiny", "-p", "omp", "-s", "50", "--accelerator", "cpu", "--save_model", "--output_dir", str(out)]
    )
    (folder,) = (path for path in out.glob("omp/*") if path.is_dir())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == len(served)
    for file in files:
        with safe_open(file, framework="pt") as content:
            assert {content.get_slice(key).get_dtype() for key in content.keys()} <= {"BF16", "I64"}  # noqa: SIM118
    view = external.prunable_view(external.build(f"hf:{folder}"))
    zeros = sum(int((weight.parameter == 0).sum()) for weight in view.weights.values())
    assert zeros == pytest.approx(view.numel / 2, abs=view.numel / 1000)
