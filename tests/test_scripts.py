"""prune.py and pretrain.py end to end on two-layer models: what they write, on one process and two, killed, misused."""

import csv
import json
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import compare
import pretrain
import prune
import pruners
from configs.loading import load_config
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from engine.evaluation.retrieval import SHOWN
from engine.launch import run
from engine.pruning.run import RECORDED
from engine.training.loggers import CsvLog
from models.xvlm import model as xvlm
from pruners.presets import PRESETS
from sparsity.allocation.budget import budget
from sparsity.masks import Masks, model_digest
from sparsity.run.axes import POOLS
from sparsity.view import members
from tests.browser import PHONE, look, needs_browser
from tests.processes import PATIENCE, PLAIN, error_line, held, only_bars

pytestmark = pytest.mark.script

CONFIGS = Path("tests/data/configs")
SMALL = ["--accelerator", "cpu", "--num_batches", "3"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time of a small run; processes of their own draw them."""
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])


def prune_options(folder, pruner, *options, config=CONFIGS / "prune.yaml"):
    return ["-m", "xvlm", "-p", pruner, "--config", str(config), "--output_dir", str(folder), *SMALL, *options]


def pruned(folder, pruner, *options, **config):
    """Prune in this process; the folder with the results."""
    prune.main(prune_options(folder, pruner, *options, **config))
    return folder / pruner


def script(*command, **options):
    """A script in a process of its own, which must succeed; what it printed."""
    options = {"env": PLAIN, "timeout": PATIENCE, **options}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done


def mask_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_pruning_masks.safetensors"))}


def same_but_for_sums(one, two):
    """Masks, in files, of float32 sums in different orders: what lies at the threshold may be on either side of it."""
    ours, theirs = Masks.load(one), Masks.load(two)
    differing = sum(int((ours[layer] != theirs[layer]).sum()) for layer in ours)
    assert ours.keys() == theirs.keys() and differing <= 1e-3 * ours.total and ours.kept == theirs.kept


@pytest.fixture(scope="module")
def view():
    model = xvlm.build(load_config(CONFIGS / "model.yaml", xvlm.Config))
    return xvlm.prunable_view(model)


# prune.py: what it writes


def check_budget(masks, view, pool, sparsity):
    """Exactly floor(s * n) of each pool are gone."""
    groups = {weight.name: weight.group for weight in view.weights.values()}
    gone = {name: int((~masks[name]).sum()) for name in groups}
    if pool == "row":
        for name, weight in view.weights.items():
            assert gone[name] == weight.shape[0] * budget(sparsity, weight.shape[1])
        return
    if pool == "block":
        for name in groups:
            blocks = masks[name].split(128, dim=1)
            assert [int((~block).sum()) for block in blocks] == [budget(sparsity, b.numel()) for b in blocks]
        return
    contests = {"global": [list(groups)], "layer": [[name] for name in groups]}
    for names in contests.get(pool, members(groups).values()):
        assert sum(gone[name] for name in names) == budget(sparsity, sum(view.weights[name].numel for name in names))


@pytest.mark.parametrize("pruner", pruners.available())
def test_every_pruner_is_exact_and_repeats_itself(tmp_path, view, pruner):
    first = pruned(tmp_path / "a", pruner, "-s", "30,63,90.5")
    files = mask_files(first)
    assert list(files) == [f"xvlm_{pruner}_{s}_seed42_pruning_masks.safetensors" for s in ("30", "63", "90.5")]
    for name, sparsity in zip(files, ("0.3", "0.63", "0.905"), strict=True):
        masks = Masks.load(first / name)
        masks.check(view)
        plan = pruners.build(pruner).plan
        pool = (
            "global"
            if plan.whole
            else next(p for p, both in POOLS.items() if both == (plan.allocation.name, plan.scope))
        )
        check_budget(masks, view, pool, sparsity)
    assert mask_files(pruned(tmp_path / "b", pruner, "-s", "90.5,63,30")) == files


@pytest.mark.parametrize("pruner", pruners.available())
def test_every_pruner_follows_a_pattern(tmp_path, view, pruner):
    folder = pruned(tmp_path, pruner, "--pattern", "2:4")
    masks = Masks.load(folder / f"xvlm_{pruner}_2of4_seed42_pruning_masks.safetensors")
    for name in view.weights:
        assert (masks[name].unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert "2:4" in (folder / "report.md").read_text()


@pytest.mark.parametrize("preset", pruners.presets())
def test_a_preset_is_pruned_with_and_the_report_says_what_it_stood_for(tmp_path, view, preset):
    folder = pruned(tmp_path, preset, "-s", "50,75")
    masks = Masks.load(folder / f"xvlm_{preset}_75_seed42_pruning_masks.safetensors")
    masks.check(view)
    plan = pruners.build(preset, sparsities=["0.75"]).plan
    assert masks.provenance["pruner"] == plan.name and masks.provenance["preset"] == plan.preset
    report = (folder / "report.md").read_text()
    assert f"{preset}, version {PRESETS[preset].version}: -p {plan.name}" in report
    assert len(list(folder.glob("*_weights.safetensors"))) == 2 * (preset == "best")


def test_iterations(tmp_path, view):
    once = pruned(tmp_path / "once", "itersnip", "-s", "63")
    name = "xvlm_itersnip_63_seed42_pruning_masks.safetensors"
    files = {(once / name).read_bytes()}
    for schedule in ("linear", "exp"):
        options = ("-s", "63", "-e", "3", "--schedule", schedule, "--num_batches", "2")
        folders = [pruned(tmp_path / f"{schedule}{i}", "itersnip", *options) for i in range(2)]
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second and first not in files
        files.add(first)
        check_budget(Masks.load(folders[0] / name), view, "global", "0.63")


def test_a_pool_of_choice(tmp_path, view):
    for pool in ("global", "layer", "group", "row", "block", "magnitude"):
        folder = pruned(tmp_path / pool, "omp", "-s", "63", "--pool", pool)
        masks = Masks.load(folder / "xvlm_omp_63_seed42_pruning_masks.safetensors")
        check_budget(masks, view, pool, Fraction(63, 100))
        assert masks.provenance["pool"] == pool


def test_the_seed_changes_what_is_random(tmp_path):
    a, b = (pruned(tmp_path, "rand", "-s", "50", "--seed", seed) for seed in ("1", "2"))
    one, two = mask_files(a).values()
    assert a == b and one != two


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """All that prune.py can write, from a process of its own: the folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    options = prune_options(folder, "multiflow", "-s", "50,75", "--evaluate", "--save_scores")
    return folder / "multiflow", script("prune.py", *options)


def test_a_process_of_its_own_writes_the_same_masks(whole_run, tmp_path):
    assert mask_files(whole_run[0]) == mask_files(pruned(tmp_path, "multiflow", "-s", "50,75"))


def test_all_files_are_there_and_nothing_else(whole_run):
    names = {path.name for path in whole_run[0].iterdir() if path.suffix != ".png"}
    masks = {f"xvlm_multiflow_{s}_seed42_pruning_masks.safetensors" for s in (50, 75)}
    scores = "xvlm_multiflow_seed42_scores.safetensors"
    assert names == masks | {scores, "config.yaml", "recipe.yaml", "report.json", "report.md", "runtimes.csv"}
    pictures = {path.name for path in whole_run[0].glob("*.png")}
    assert pictures == set(re.findall(r"\]\((.*)\)", (whole_run[0] / "report.md").read_text()))


def test_a_page_shows_what_captions_find(whole_run):
    told = json.loads((whole_run[0] / "report.json").read_text())
    found = told["retrieved"]
    assert [row["sparsity"] for row in told["rows"]] == list(found["found"]) == ["dense", "50", "75"]
    assert {len(numbers) for numbers in (found["captions"], found["right"], *found["found"].values())} == {SHOWN}
    assert {*found["pictures"]} == {str(n) for numbers in (found["right"], *found["found"].values()) for n in numbers}
    compare.main(["--pruned", str(whole_run[0].parent)])
    page = (whole_run[0].parent / "report.html").read_text()
    sources = re.findall(r'src="(.*?)"', page)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    # The curves, the pictures of the report, and for each caption its own and what each model finds.
    assert len(sources) == 1 + len(list(whole_run[0].glob("*.png"))) + SHOWN * 4


@needs_browser
def test_a_browser_shows_all_of_the_page(whole_run, tmp_path):
    compare.main(["--pruned", str(whole_run[0].parent)])
    seen = look((whole_run[0].parent / "report.html").read_text(), tmp_path, PHONE)
    assert not (seen.broken or seen.repeated or seen.requests or seen.console)
    assert seen.width == PHONE, "wide tables and pictures scroll by themselves"
    report = (whole_run[0] / "report.md").read_text()
    pictures = re.findall(r"!\[(.*)\]", report)
    assert len(seen.images) == 1 + len(pictures) + SHOWN * 4 and all(alt and width for alt, width in seen.images)
    compared = ["Summary", "Quality by sparsity", "Retrieved pictures", "All numbers"]
    own = re.findall(r"^#+ (.*)", report, re.MULTILINE)
    assert {*pictures} < {*own} and seen.headings == ["Pruning report", *compared, *own]
    rows = json.loads((whole_run[0] / "report.json").read_text())["rows"]
    numbers = [[f"{value:.1f}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    assert [[*rows[0]], *numbers] in seen.tables, "of the run"
    assert [row[1:] for row in next(table for table in seen.tables if table[0][0] == "pruner")[1:]] == numbers


def test_the_table_is_on_stdout_and_the_bars_are_not(whole_run):
    folder, printed = whole_run
    lines = printed.stdout.split("\n")
    table = [line for line in lines if line.startswith("|")]
    assert [line.split()[1] for line in table] == ["sparsity", "--------", "dense", "50", "75"]
    for column in ("vision %", "text %", "fusion %", "all %", "i2t R@1", "t2i R@10", "seconds"):
        assert column in table[0]
    assert "batch/s" not in printed.stdout
    assert f"  {folder}/report.md" in lines
    assert only_bars(printed.stderr) and "batch/s]" in printed.stderr
    last = printed.stderr.rpartition("batch/s]")[2]
    assert re.match(r"[^\r\n]*[\r\n] {20,}", last), "the last bar is wiped off the screen"


def test_scores_explain_the_masks(whole_run, view):
    folder, _ = whole_run
    scores = load_file(folder / "xvlm_multiflow_seed42_scores.safetensors")
    masks = Masks.load(folder / "xvlm_multiflow_75_seed42_pruning_masks.safetensors")
    assert set(scores) == set(view.weights)
    for name, score in scores.items():
        kept = masks[name]
        assert score.shape == kept.shape
        assert kept.all() or not kept.any() or score[kept].min() >= score[~kept].max()


def test_run_times_and_configuration(whole_run):
    folder, _ = whole_run
    with (folder / "runtimes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sparsity"] for row in rows] == ["50", "75"]
    assert all(float(row["calibration_seconds"]) > 0 and row["pruner"] == "multiflow" for row in rows)
    assert int(rows[0]["pruned"]) / int(rows[0]["prunable"]) == pytest.approx(0.5, abs=1e-3)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["arguments"]["num_batches"] == 3 and saved["arguments"]["sparsities"] == ["0.5", "0.75"]
    assert saved["config"]["model_config"] == str(CONFIGS / "model.yaml")
    provenance = Masks.load(folder / "xvlm_multiflow_50_seed42_pruning_masks.safetensors").provenance
    assert provenance["config"] == saved["config"] | {name: saved["arguments"][name] for name in RECORDED}


def test_no_place_of_this_machine_is_written(whole_run):
    """But for what the user gave: the folder of the results, here."""
    folder, printed = whole_run
    here = str(Path.cwd())
    for path in folder.iterdir():
        assert here.encode() not in path.read_bytes(), path.name
    assert here not in printed.stdout


def test_run_times_are_added_and_masks_replaced(tmp_path):
    for _ in range(2):
        folder = pruned(tmp_path, "omp", "-s", "50")
    assert len((folder / "runtimes.csv").read_text().splitlines()) == 3
    assert len(mask_files(folder)) == 1


def test_weights_of_a_file(tmp_path, view):
    path = tmp_path / "w.pth"
    torch.save({"model": view.model.state_dict()}, path)
    folder = pruned(tmp_path, "omp", "-s", "50", "--weights", str(path))
    masks = Masks.load(folder / "xvlm_omp_50_seed42_pruning_masks.safetensors")
    assert masks.provenance["model"] == model_digest(view)
    assert f"- weights: {path}" in (folder / "report.md").read_text()


def test_public_files(tmp_path):
    """Calibration and evaluation on files in the public layouts."""
    export_public(tmp_path, 8, load_glyphs(), side=48)
    images = str(tmp_path / "images")

    def files(name, folder=images):
        return {"annotations": str(tmp_path / "data" / name), "images": folder}

    config = yaml.safe_load((CONFIGS / "prune.yaml").read_text()) | {
        "bundled": False,
        "general": [files("pretrain/cc3m_pretrain.json"), files("pretrain/coco_karpathy_gby_image.json")],
        "region": [files("pretrain/vg_regions.json")],
        "evaluation": {"files": files("finetune/itr/coco_test.json", f"{images}/coco"), "k_test": 4},
    }
    (tmp_path / "public.yaml").write_text(yaml.safe_dump(config))
    options = ("-s", "63", "--evaluate", "--num_batches", "2")
    folder = pruned(tmp_path / "out", "multiflow", *options, config=tmp_path / "public.yaml")
    assert "i2t R@1" in (folder / "report.md").read_text() and not (folder / "skipped.txt").exists()
    assert len(mask_files(folder)) == 1


# Two processes


@pytest.mark.multiprocess
@pytest.mark.parametrize("pruner", ["multiflow", pytest.param("omp", marks=pytest.mark.slow)])
def test_two_processes_give_the_masks_of_one(tmp_path, pruner):
    options = ("-s", "50,75", "--evaluate") if pruner == "multiflow" else ("-s", "50,75")
    printed = script("prune.py", *prune_options(tmp_path / "two", pruner, *options, "--devices", "2"))
    one = pruned(tmp_path / "one", pruner, *options)
    assert mask_files(tmp_path / "two" / pruner) == mask_files(one)
    assert printed.stdout.count("| sparsity") == 1 and only_bars(printed.stderr)
    names = {p.name for p in (tmp_path / "two" / pruner).iterdir() if p.suffix != ".png"}
    assert names == {p.name for p in one.iterdir()}

    def table(folder):
        text = (folder / "report.md").read_text()
        return [line.split("|")[:-2] for line in text.split("\n") if re.match(r"\| (dense|50|75) ", line)]

    assert table(tmp_path / "two" / pruner) == table(one)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_snip_on_two_processes_differs_by_the_order_of_sums_alone(tmp_path):
    script("prune.py", *prune_options(tmp_path / "two", "snip", "-s", "50,75", "--devices", "2"))
    one = pruned(tmp_path / "one", "snip", "-s", "50,75")
    for name in mask_files(one):
        same_but_for_sums(tmp_path / "one" / "snip" / name, tmp_path / "two" / "snip" / name)


@pytest.mark.multiprocess
def test_pretraining_on_two_processes(tmp_path):
    config, folder = str(CONFIGS / "pretrain.yaml"), tmp_path / "out"
    options = ["--config", config, "--output_dir", str(folder), "--accelerator", "cpu", "-d", "2"]
    printed = script("pretrain.py", *options)
    assert printed.stdout.count("weights:") == 1 and only_bars(printed.stderr)
    weights = load_file(folder / "xvlm.safetensors")
    assert all(t.isfinite().all() for t in weights.values())
    with pytest.raises(ValueError, match="devices 2 -> 1"):
        pretrain.main([*options[:-1], "1"])


# pretrain.py: to the end, killed, interrupted


def pretrain_options(folder, config=CONFIGS / "pretrain.yaml"):
    return ["--config", str(config), "--output_dir", str(folder), "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A configuration long enough to be killed in, and the weights to which it leads."""
    folder = tmp_path_factory.mktemp("longer")
    config = yaml.safe_load((CONFIGS / "pretrain.yaml").read_text()) | {"save_every": 7, "validate_every": 40}
    config["stages"][0]["steps"], config["stages"][1]["steps"] = 30, 60
    (folder / "longer.yaml").write_text(yaml.safe_dump(config))
    torch.set_num_threads(1)  # as in the processes that are killed: sums depend on it
    pretrain.main(pretrain_options(folder / "whole", folder / "longer.yaml"))
    return folder / "longer.yaml", folder / "whole"


def log_rows(folder):
    with (folder / "log.csv").open(newline="") as file:  # perhaps while a line is being written
        return [(row[0], *row[2:]) for row in csv.reader(file) if len(row) == 4]


HELD_AT_A_STEP = f"""
import pretrain
from {run.__module__} import run
from {CsvLog.__module__} import CsvLog
until, write = int(sys.argv[1]), CsvLog.write

def write_and_hold(self, step, values):
    write(self, step, values)
    if step == until:
        hold()

CsvLog.write = write_and_hold
run(lambda: pretrain.main(sys.argv[2:]))
"""


def started(config, folder, until):
    """pretrain.py in a process of its own, which has logged so many steps and does not go on."""
    return held(HELD_AT_A_STEP, until, *pretrain_options(folder, config), log=folder.with_name("stderr.txt"))


def test_pretraining_to_the_end(longer, capsys):
    config, folder = longer
    content = (folder / "xvlm.safetensors").read_bytes()
    pretrain.main(pretrain_options(folder, config))  # there is nothing left to do
    assert (folder / "xvlm.safetensors").read_bytes() == content
    again = f"this run is finished; delete {folder}/last.pt to train again\n"
    told = f"{again}weights: {folder}/xvlm.safetensors\nlog: {folder}/log.csv\n"
    assert capsys.readouterr().out == told
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "last.pt", "log.csv", "xvlm.safetensors"}
    rows = log_rows(folder)
    assert rows[-1][0] == "90" and len(rows) == len(set(rows))
    names = {name for _, name, _ in rows}
    assert {"loss", "general/itc", "general/mlm", "region/bbox", "validation/r_mean", "lr", "norm"} <= names
    sizes = load_config(CONFIGS / "model.yaml", xvlm.Config)
    model = xvlm.build(sizes, folder / "xvlm.safetensors")  # what was written is what is read
    assert model.temp.item() == pytest.approx(0.07, abs=0.1)


@pytest.mark.multiprocess
def test_an_interrupted_and_a_killed_run_end_with_the_same_bits(longer, tmp_path):
    (config, whole), folder = longer, tmp_path / "out"
    with started(config, folder, until=14) as process:  # in the first stage
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    heard = (tmp_path / "stderr.txt").read_text()
    assert "\ninterrupted\n" in heard and "Traceback" not in heard
    assert {p.name for p in folder.iterdir()} == {"config.yaml", "last.pt", "log.csv"}

    with started(config, folder, until=49) as process:  # in the second
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert not (folder / "xvlm.safetensors").exists()
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 42

    pretrain.main(pretrain_options(folder, config))
    assert (folder / "xvlm.safetensors").read_bytes() == (whole / "xvlm.safetensors").read_bytes()
    assert log_rows(folder) == log_rows(whole)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}


def test_another_configuration_is_refused(tmp_path, capsys):
    pretrain.main(pretrain_options(tmp_path))
    config = yaml.safe_load((CONFIGS / "pretrain.yaml").read_text()) | {"lr": 0.5}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    told = refused(capsys, pretrain.main, pretrain_options(tmp_path, tmp_path / "other.yaml"))
    assert "training.lr 0.001 -> 0.5" in told


# Bad input: one line, exit code 2, nothing written


def refused(capsys, main, arguments):
    """The one line that a script prints."""
    with pytest.raises(SystemExit) as caught:
        run(lambda: main(arguments))
    assert caught.value.code == 2
    return error_line(capsys.readouterr().err)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """An environment in which importing torch fails."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in ("torch", "torchvision", "lightning", "transformers", "timm", "matplotlib"):
        (folder / f"{name}.py").write_text("raise ImportError('too early')")
    return {**PLAIN, "PYTHONPATH": str(folder)}


def early(command, environment):
    given = {"env": environment, "timeout": PATIENCE}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **given)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    return error_line(done.stderr)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "the following arguments are required: -m/--model"),
        (["-m", "xvlm"], "the following arguments are required: -p/--pruner"),
        (["-p", "multiflo", "-m", "xvlm"], "no pruner 'multiflo', did you mean 'multiflow'?"),
        (["-p", "omp", "-m", "xvml"], "no model 'xvml', did you mean 'xvlm'?"),
        (["-s", "0"], "sparsity is a percentage from 1 to 99.99 or a fraction below 1, got '0'"),
        (["-s", "100"], "got '100'"),
        (["-s", "-5"], "got '-5'"),
        (["-s", "abc"], "sparsities are comma-separated numbers like 63,75,90, got 'abc'"),
        (["-s", "nan"], "got 'nan'"),
        (["-s", "63,,75"], "got '' in '63,,75'"),
        (["-s", ""], "got ''"),
        (["--num_batches", "0"], "--num_batches: expected an integer of at least 1, got '0'"),
        (["-e", "0"], "-e/--epochs: expected an integer of at least 1, got '0'"),
        (["--schedule", "cosine"], "--schedule: invalid choice: 'cosine'"),
        (["--pattern", "4:2"], "pattern must be N:M with N weights kept of every M, 1 <= N < M"),
        (["--pattern", ""], "pattern must be N:M"),
        (["--pattern", "2:4", "-s", "50"], "leave --sparsities out"),
        (["--pattern", "2:4", "--pool", "row"], "leave --pool out"),
        (["--pool", "nonsense"], "--pool: invalid choice: 'nonsense'"),
        (["--lambda_", "nan"], "--lambda_: expected a number above 0, got 'nan'"),
        (["--max_skipped", "7"], "--max_skipped: expected a fraction between 0 and 1, got '7'"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 2^32 - 1"),
        (["--sparsity", "50"], "did you mean --sparsities?"),
        (["--weights", "absent.pth"], "absent.pth: weights file not found; give --weights PATH, or --weights random"),
        (["--config", "absent.yaml"], "absent.yaml: configuration file not found"),
        (["--config", "README.md"], "README.md: not valid YAML"),
        (["--output_dir", "README.md"], "--output_dir README.md/omp: "),
        (["--output_dir", "/proc/pruned"], "--output_dir /proc/pruned/omp: cannot be written to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_of_pruning_are_refused_before_heavy_imports(tmp_path, without_torch, options, told):
    given = options if "-m" in options or not options else ["-p", "omp", "-m", "xvlm", *options]
    if options:
        given = ["--output_dir", str(tmp_path / "out"), "--config", str(CONFIGS / "prune.yaml"), *given]
    assert told in early(["prune.py", *given], without_torch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{weights: random", "not valid YAML"),
        ("[1, 2]", "expected a mapping"),
        ("weights: random", "key 'model_config' is missing"),
        ("{model_config: m, weights: random, batchsize: 3}", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("{model_config: m, weights: random, batch_size: 0}", "batch_size must be at least 1, got 0"),
        ("{model_config: m, weights: random, batch_size: two}", "batch_size: expected an integer, got 'two'"),
        ("{model_config: absent.yaml, weights: random}", "absent.yaml: configuration file not found"),
        ("{model_config: README.md, weights: random}", "README.md: not valid YAML"),
        ("{model_config: MODEL, weights: random}", "no evaluation data"),
        ("{model_config: MODEL, weights: random, bundled: true, general: [{annotations: a, images: b}]}", "not both"),
        ("{model_config: MODEL, weights: random, evaluation: {files: {annotations: a.json, images: .}}}", "a.json"),
        ("{model_config: MODEL, weights: absent.pth}", "absent.pth: weights file not found"),
    ],
)
def test_bad_configurations_of_pruning(tmp_path, without_torch, content, told):
    path = tmp_path / "c.yaml"
    path.write_text(content.replace("MODEL", str(CONFIGS / "model.yaml")))
    options = prune_options(tmp_path / "out", "omp", "--evaluate", config=path)
    assert told in early(["prune.py", *options], without_torch)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-m", "xvml"], "did you mean 'xvlm'?"),
        (["--config", "absent.yaml"], "absent.yaml: configuration file not found"),
        (["--config", str(CONFIGS / "model.yaml")], "unknown key 'vision'"),
        (["--output_dir", "README.md"], "--output_dir README.md: "),
        (["--lr", "3"], "unrecognized argument --lr"),
        (["--devices", "none"], "--devices: expected an integer of at least 1"),
    ],
)
def test_bad_arguments_of_pretraining(tmp_path, without_torch, options, told):
    folder = [] if "--output_dir" in options else ["--output_dir", str(tmp_path / "out")]
    assert told in early(["pretrain.py", *folder, *options], without_torch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stages": []}, "stages must have at least one stage"),
        ({"stages": [{"steps": 1}]}, "stages[0]: key 'batch_size' is missing"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or muon, got 'sgd'"),
        ({"betas": [0.9]}, "betas must be two numbers"),
        ({"lr": -1}, "lr must be at least 0"),
        ({"save_every": 0}, "save_every must be at least 1"),
    ],
)
def test_bad_configurations_of_pretraining(tmp_path, without_torch, change, told):
    config = yaml.safe_load((CONFIGS / "pretrain.yaml").read_text()) | change
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert told in early(["pretrain.py", *pretrain_options(tmp_path / "out", tmp_path / "c.yaml")], without_torch)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"objectives": ["itd"]}, "unknown objective 'itd'; the model has itc, itm, mlm, bbox"),
        ({"max_objects": 9}, "max_objects must be between 1 and 4, got 9"),
    ],
)
def test_stages_that_the_model_or_the_scenes_refuse(tmp_path, capsys, change, told):
    config = yaml.safe_load((CONFIGS / "pretrain.yaml").read_text())
    config["stages"][1] |= change
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert told in refused(capsys, pretrain.main, pretrain_options(tmp_path / "out", tmp_path / "c.yaml"))
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def spoil(tmp_path, view):
    """Weights files that don't fit, with what is said of them."""
    state = {name: t.clone() for name, t in view.model.state_dict().items()}
    torch.save({"model": {k: v for k, v in state.items() if k != "temp"}}, tmp_path / "missing.pth")
    torch.save({"model": state | {"itm_head.0.weight": torch.zeros(2, 2)}}, tmp_path / "misshapen.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk" * 99)
    return {
        "missing.pth": "missing.pth: weights of another model: 1 missing: temp",
        "misshapen.pth": "misshapen.pth: weights of another model: 1 misshapen: itm_head.0.weight (2, 2) (expected",
        "junk.pth": "junk.pth: not a readable weights file",
    }


def test_weights_that_do_not_fit(tmp_path, view, capsys):
    for name, told in spoil(tmp_path, view).items():
        options = prune_options(tmp_path / "out", "omp", "--weights", str(tmp_path / name))
        assert told in refused(capsys, prune.main, options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bundled": False}, "no calibration data: set bundled: true, or give general and region files"),
        ({"general": "absent.json"}, "absent.json: annotation file not found"),
        ({"general": "empty.json"}, "empty.json: no record in this file"),
        ({"region": "broken.json"}, "broken.json: not a JSON file"),
        ({"general": "pictureless.json"}, "none of 1 images of"),
    ],
)
def test_calibration_data_that_is_not_there(tmp_path, capsys, change, told):
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "broken.json").write_text("[{]")
    (tmp_path / "pictureless.json").write_text(json.dumps([{"image": "1.jpg", "caption": "a cat"}]))
    sources = {k: [{"annotations": str(tmp_path / v), "images": str(tmp_path)}] for k, v in change.items() if v}
    config = yaml.safe_load((CONFIGS / "prune.yaml").read_text()) | {"bundled": False} | sources
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    options = prune_options(tmp_path / "out", "multiflow", config=tmp_path / "c.yaml")
    assert told in refused(capsys, prune.main, options)
    assert not (tmp_path / "out").exists()
    pruned(tmp_path / "out", "omp", config=tmp_path / "c.yaml")  # needs no data, and asks for none


def test_evaluation_data_is_opened_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty.json").write_text("[]")
    config = yaml.safe_load((CONFIGS / "prune.yaml").read_text())
    config["evaluation"] = {"files": {"annotations": str(tmp_path / "empty.json"), "images": str(tmp_path)}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("sparsity.run.engine.Engine.measure", lambda *_: pytest.fail("too late"))
    options = prune_options(tmp_path / "out", "multiflow", "--evaluate", config=tmp_path / "c.yaml")
    assert "empty.json: no record in this file" in refused(capsys, prune.main, options)


def test_images_that_cannot_be_read(tmp_path, capsys):
    export_public(tmp_path, 6, load_glyphs(), side=48)
    broken = sorted((tmp_path / "images/cc3m/bundled").iterdir())[0]
    broken.write_bytes(b"no image")
    files = {"annotations": str(tmp_path / "data/pretrain/cc3m_pretrain.json"), "images": str(tmp_path / "images")}
    config = yaml.safe_load((CONFIGS / "prune.yaml").read_text())
    config |= {"bundled": False, "general": [files], "batch_size": 6, "workers": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    options = prune_options(tmp_path / "out", "multiflow", "-s", "50", config=tmp_path / "c.yaml")
    assert "1 of 6 samples were skipped" in refused(capsys, prune.main, options)
    listed = tmp_path / "out/multiflow/skipped.txt"
    listed.write_text("of/an/earlier/run.jpg\tgone\n")
    prune.main([*options, "--max_skipped", "0.5"])
    (line,) = listed.read_text().splitlines()
    assert line.startswith(f"{broken}\t")


# Help


@pytest.mark.parametrize("name", ["prune.py", "pretrain.py"])
def test_help_needs_no_heavy_import_and_names_all_defaults(without_torch, name):
    done = subprocess.run([sys.executable, name, "--help"], capture_output=True, text=True, env=without_torch)
    assert done.returncode == 0, done.stderr
    options = re.split(r"\n  (?=-)", done.stdout)[2:]
    for option in options:
        assert "default" in option or option.startswith(("-p", "-m")), option
    assert "xvlm" in done.stdout


def test_the_options_of_the_published_script():
    given = ["-p", "omp", "-m", "xvlm", "-s", "63", "--seed", "1", "--num_batches", "2", "-e", "3"]
    args = prune.parse([*given, "--schedule", "linear", "--output_dir", "o", "--lambda_", "1e-3"])
    assert (args.epochs, args.schedule, args.lambda_, args.seed) == (3, "linear", 1e-3, 1)
    long = prune.parse(["--pruner", "omp", "--model", "xvlm", "--sparsities", "63", "--epochs", "3"])
    assert (long.pruner, long.model, long.sparsities, long.epochs) == ("omp", "xvlm", "63", 3)
    defaults = prune.parse(["-p", "omp", "-m", "xvlm"])
    assert (defaults.num_batches, defaults.epochs, defaults.schedule, defaults.seed) == (3000, 1, "exp", 42)
    assert defaults.lambda_ == 1e-5 and str(defaults.output_dir) == "pruned_weights"
