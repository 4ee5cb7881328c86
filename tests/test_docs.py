"""README.md and docs/: links that resolve, commands that the scripts take, code that runs."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import prune
import pruners
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from sparsity.errors import UserError
from sparsity.run.generic import generic_view

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
OF_OTHERS = ("migrating.md",)  # pages with the commands of other tools beside ours
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_EXTERNAL = ("http://", "https://")
_SHELL = ("", "bash")  # languages of blocks that may have commands


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and Python-Markdown both make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[str]:
    """Return the command lines of blocks and of code in sentences, without comments and prompts."""
    blocks = [body for language, body in _FENCE.findall(text) if language in _SHELL]
    inline = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", _FENCE.sub("", text))
    for body in [*blocks, *inline]:
        for line in body.replace("\\\n", " ").splitlines() if body in blocks else [" ".join(body.split())]:
            command = re.sub(r"\s#.*$", "", line).strip()
            if re.match(r"(srun )?(python|torchrun) |scripts/\w|make ", command):
                yield command


def documented(path: Path) -> list[str]:
    """Return the commands of a page, or of a script's docstring."""
    if path.suffix == ".md":
        return list(commands(path.read_text()))
    text = path.read_text().split('"""')[1]
    return list(commands("```\n" + "\n".join(line for line in text.splitlines() if line.startswith("    ")) + "\n```"))


def arguments(command: str) -> tuple[str, list[str]]:
    """Return the script of a command and its arguments; [--option VALUE] in brackets is an option like others."""
    words = shlex.split(command.replace("[--", "--").replace("]", ""))
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place].removesuffix(".py"), words[place + 1 :]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_resolve(path):
    for link in _LINK.findall(_FENCE.sub("", path.read_text())):
        if link.startswith(_EXTERNAL):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def test_every_page_is_linked_from_the_readme_or_a_page_that_is():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        path = left.pop()
        if path.suffix == ".md" and path not in seen:
            seen.add(path)
            links = [link.partition("#")[0] for link in _LINK.findall(path.read_text())]
            left += [(path.parent / link).resolve() for link in links if link and not link.startswith(_EXTERNAL)]
    assert {*PAGES} <= seen, sorted(name(path) for path in {*PAGES} - seen)


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / f"{script}.py" for script in sorted(SCRIPTS))], ids=name)
def test_scripts_take_the_commands(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("FOLDER").mkdir()
    for command in documented(path):
        if ".py" not in command or "pytest" in command:
            continue
        script, given = arguments(command)
        if path.name in OF_OTHERS and script not in SCRIPTS:
            continue
        assert script in SCRIPTS, f"{command}: there is no such script"
        if not given or given == ["--help"] or "..." in given:
            continue
        try:
            importlib.import_module(script).parse(given)
        except UserError as error:  # a file that the reader has
            assert "no such file" in str(error), command
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_what_else_is_run_exists(path):
    makefile = (ROOT / "Makefile").read_text()
    for command in documented(path):
        words = shlex.split(command)
        if command.startswith("scripts/"):
            assert (ROOT / words[0]).stat().st_mode & 0o100, f"{words[0]}: not executable"
        elif words[0] == "make":
            targets = [word for word in words[1:] if re.fullmatch(r"[a-z\-]+", word)]
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), command
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), command


def test_no_command_is_calibrated_on_the_figures_of_the_repository():
    for path in PAGES:
        assert not re.search(r"--calibration images/?( |$)", "\n".join(documented(path))), name(path)


def test_the_code_of_extending_runs():
    code = "\n".join(body for language, body in _FENCE.findall((ROOT / "docs/extending.md").read_text()) if language)
    exec(code, {"__name__": "extending"})


def test_the_mask_of_the_quickstart_is_held():
    (code,) = [body for _, body in _FENCE.findall((ROOT / "docs/quickstart.md").read_text()) if "hold =" in body]
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    masks, view = pruners.prune(model, "magnitude", sparsity=0.5), generic_view(model)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    names = {"masks": masks, "view": view, "model": model, "loader": [torch.randn(6, 8) for _ in range(3)]}
    names |= {"optimizer": torch.optim.AdamW(model.parameters(), lr=0.1), "loss": lambda m, x: m(x).square().mean()}
    exec(code, names)
    for name, mask in masks.items():
        weight = model.state_dict()[name]
        assert not weight[~mask].any() and (weight[mask] != before[name][mask]).all()


@pytest.mark.slow
def test_a_model_of_timm_as_the_readme_prunes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])
    (command,) = [c for c in documented(ROOT / "README.md") if "timm:vit_mini" in c]
    assert any(c == "scripts/export_bundled.sh output/scenes 128" for c in documented(ROOT / "README.md"))
    export_public(tmp_path / "output/scenes", 16, load_glyphs(), side=32)
    prune.main(arguments(command)[1])
    told = capsys.readouterr().out
    assert re.search(r"\| 50 +\| +50\.00 \| 50\.00 \|", told) and "_model.safetensors" in told
