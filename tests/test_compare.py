"""compare.py on the two-layer model: what it computes, how often, what it writes, killed and resumed."""

import csv
import math
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
import yaml

import compare
import pruners
from configs.loading import load_config
from engine.pruning.comparison import (
    ANY_SEED,
    COSTS,
    DENSE,
    INT8,
    Cost,
    Entry,
    Ledger,
    latex,
    markdown,
    mean_and_error,
    seeds_of,
    sharing,
)
from models.xvlm import model as xvlm
from sparsity.allocation.budget import budget
from sparsity.run import engine
from tests.processes import PATIENCE, PLAIN, held, only_bars
from tests.test_scripts import CONFIGS, SMALL, early, pruned, refused, without_torch  # noqa: F401

pytestmark = pytest.mark.script

ONE_SHOT = ["l2", "lamp", "localmp", "magnitude", "multiflow", "omp", "rand", "snip", "wanda"]


def options(folder, *more, config=CONFIGS / "prune.yaml"):
    return ["-m", "xvlm", "--config", str(config), "--output_dir", str(folder), *SMALL, *more]


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows):
    return sorted(tuple(v for k, v in row.items() if k not in ("date", *COSTS)) for row in rows)


@pytest.fixture
def calls(monkeypatch):
    """How often each statistic is collected, and the model evaluated."""
    counted = Counter()
    collect, evaluate = engine.collect, "engine.evaluation.retrieval.ZeroShot.__call__"

    def counting(view, statistics, *arguments, **more):
        counted.update(statistics)
        return collect(view, statistics, *arguments, **more)

    metrics = {f"{way}_r{k}": 50.0 for way in ("txt", "img") for k in (1, 5, 10)}
    monkeypatch.setattr("sparsity.run.engine.collect", counting)
    monkeypatch.setattr(evaluate, lambda self: counted.update(["evaluate"]) or metrics)
    return counted


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison from a process of its own: the folder and what it printed."""
    folder = tmp_path_factory.mktemp("compared")
    command = [sys.executable, "compare.py", *options(folder, "-s", "50,75", "--seeds", "42,43")]
    done = subprocess.run(command, capture_output=True, text=True, env=PLAIN, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return folder, done


# What is computed


def test_all_one_shot_pruners_are_compared_where_none_is_named(whole):
    rows = results(whole[0])
    runs = {(row["pruner"], row["sparsity"], row["seed"]) for row in rows}
    drawn = [name for name in ONE_SHOT if name in ("multiflow", "rand", "snip", "wanda")]
    expected = {(name, s, seed) for name in drawn for s in ("50", "75") for seed in ("42", "43")}
    expected |= {(name, s, ANY_SEED) for name in ONE_SHOT if name not in drawn for s in ("50", "75")}
    assert runs >= expected | {(DENSE, "0", ANY_SEED)} and len(rows) == len(runs)
    assert not any(row["pruner"] == "itersnip" for row in rows)


def test_a_statistic_is_collected_once_for_each_seed(tmp_path, calls):
    names = "omp,multiflow,snip,itersnip,rand"
    compare.main(options(tmp_path, "-p", names, "-s", "50,75", "--seeds", "42,43,44"))
    assert calls == {"input_norms": 3, "mean_gradient": 3, "evaluate": 1 + 2 * (1 + 4 * 3)}


def test_iterative_pruners_measure_again(tmp_path, calls):
    compare.main(options(tmp_path, "-p", "snip,itersnip", "-s", "50", "--seeds", "1", "--epochs", "3"))
    assert calls["mean_gradient"] == 1 + 2


@pytest.mark.slow
def test_the_masks_are_those_of_prune(tmp_path):
    """Group sparsities and recalls are what prune.py says of the same run."""
    state = xvlm.build(load_config(CONFIGS / "model.yaml", xvlm.Config)).state_dict()
    torch.save({"model": state}, tmp_path / "w.pth")
    content = yaml.safe_load((CONFIGS / "prune.yaml").read_text())
    content |= {"weights": str(tmp_path / "w.pth"), "evaluation": {"bundled_scenes": 20, "k_test": 4}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    more = ("-s", "63", "--k_test", "4", "--seeds", "5,7")
    compare.main(options(tmp_path / "ours", "-p", "multiflow,snip,rand,omp", *more, config=tmp_path / "c.yaml"))
    for pruner in ("multiflow", "snip", "rand", "omp"):
        given = ("-s", "63", "--seed", "7", "--evaluate")
        folder = pruned(tmp_path / "theirs", pruner, *given, config=tmp_path / "c.yaml")
        line = re.search(r"\| 63 .*\|", (folder / "report.md").read_text())[0]
        told = [float(cell) for cell in line.strip("| ").split("|")][1:-1]
        (row,) = (r for r in results(tmp_path / "ours") if (r["pruner"], r["seed"]) in {(pruner, "7"), (pruner, "-")})
        ours = [float(v) for k, v in row.items() if k.endswith(" %") or " R@" in k]
        assert ours[:4] == pytest.approx(told[:4], abs=0.006) and ours[4:] == pytest.approx(told[4:], abs=0.06)


def test_every_run_has_its_sparsity(whole):
    for row in results(whole[0]):
        sparsity = float(row["sparsity"]) / 100
        if row["pruner"] not in ("localmp", "magnitude"):  # floors of single layers
            assert float(row["all %"]) == pytest.approx(100 * budget(sparsity, 36864) / 36864, abs=0.02)


def test_groups_that_stay_dense_and_weights_of_8_bits(tmp_path, capsys):
    """Both pruned groups lose what is asked of them, by score and block by block."""
    content = yaml.safe_load((CONFIGS / "prune.yaml").read_text()) | {"dense_groups": ["fusion"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "p.yaml").write_text("a: {pruner: omp}\nb: {pruner: sparsegpt, reconstruct: sparsegpt}\n")
    more = ("--plans", str(tmp_path / "p.yaml"), "-s", "50", "--seeds", "1", "--int8")
    compare.main(options(tmp_path / "out", *more, config=tmp_path / "c.yaml"))
    rows = {row["pruner"]: row for row in results(tmp_path / "out")}
    assert list(rows) == [DENSE, INT8, "a", "b"] and "fusion %" not in rows["a"]
    assert [rows[name]["all %"] for name in rows] == ["0.0000", "0.0000", "50.0000", "50.0000"]
    assert all(float(row["peak_mb"]) > 0 for name, row in rows.items() if name in ("a", "b"))
    all_groups = options(tmp_path / "out", *more)
    assert "has the columns of another model" in refused(capsys, compare.main, all_groups)


# Resumed


def test_what_is_done_is_not_done_again(whole, tmp_path, calls):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    content, table = (folder / "results.csv").read_bytes(), (folder / "table.md").read_bytes()
    given = options(folder, "-s", "50,75", "--seeds", "42,43")
    compare.main(given)
    assert not calls and (folder / "results.csv").read_bytes() == content
    assert (folder / "table.md").read_bytes() == table
    compare.main([*options(folder, "-p", "omp,multiflow", "-s", "50", "--seeds", "43,45")])  # one more seed
    assert calls == {"input_norms": 1, "evaluate": 1}
    compare.main(options(folder, "-p", "omp,multiflow", "-s", "50", "--seeds", "43", "--num_batches", "2"))
    assert calls == {"input_norms": 2, "evaluate": 2}, "other data: omp has no use of it"
    compare.main(options(folder, "-p", "omp", "-s", "50", "--seeds", "43", "--k_test", "2"))
    assert calls["evaluate"] == 4, "another evaluation: the dense model too"
    assert (folder / "results.csv").read_bytes().startswith(content)


HELD_AT_A_ROW = f"""
import compare
from {Ledger.__module__} import Ledger
rows, add = int(sys.argv[1]), Ledger.add

def add_and_hold(self, *arguments):
    add(self, *arguments)
    if len(self.rows) == rows:
        hold()

Ledger.add = add_and_hold
compare.main(sys.argv[2:])
"""


@pytest.mark.multiprocess
def test_a_killed_run_is_readable_and_goes_on(whole, tmp_path_factory):
    tmp_path, log = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("log") / "stderr.txt"
    file = tmp_path / "results.csv"
    with held(HELD_AT_A_ROW, 5, *options(tmp_path, "-s", "50,75", "--seeds", "42,43"), log=log) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE) == -signal.SIGKILL
    done = results(tmp_path)
    assert len(done) == 5 < len(results(whole[0])) and all(None not in row.values() for row in done)
    assert not (tmp_path / "table.md").exists()
    with file.open("a") as cut:
        cut.write("0123456789abcdef,2026-11")  # a line that was not finished
    compare.main(options(tmp_path, "-s", "50,75", "--seeds", "42,43"))
    assert without_times(results(tmp_path)) == without_times(results(whole[0]))
    assert (tmp_path / "table.md").read_bytes() == (whole[0] / "table.md").read_bytes()


def test_rows_of_another_model_are_not_mixed_in(tmp_path, calls):
    state = xvlm.build(load_config(CONFIGS / "model.yaml", xvlm.Config)).state_dict()
    given = options(tmp_path / "out", "-p", "omp", "-s", "50", "--weights", str(tmp_path / "w.pth"))
    for changed in ("vision_encoder.encoder.layers.0.mlp.fc1.weight", "vision_proj.weight"):  # prunable, and not
        state[changed] *= 2
        torch.save({"model": state}, tmp_path / "w.pth")
        compare.main(given)
    compare.main(given)
    assert calls["evaluate"] == 4
    assert (tmp_path / "out" / "table.md").read_text().count("\n| omp ") == 1


def test_a_table_with_other_columns_is_refused(tmp_path, capsys):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    assert "choose another --output_dir" in refused(capsys, compare.main, options(tmp_path, "-p", "omp"))
    assert (tmp_path / "results.csv").read_text() == "a,b\n1,2\n"


# Tables


def test_standard_error():
    values = [41.0, 44.0, 47.5, 40.0]
    mean = sum(values) / 4
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 3) / math.sqrt(4)
    assert mean_and_error(values) == pytest.approx((mean, error))
    assert mean_and_error([3.0]) == (3.0, None)


def test_tables_are_well_formed(whole):
    folder, done = whole
    text = (folder / "table.md").read_text()
    table = [line for line in text.split("\n") if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and set(table[1]) <= set("|-: ")
    assert [line in done.stdout for line in table] == [True] * len(table)
    tex = (folder / "table.tex").read_text()
    lines = [line for line in tex.split("\n") if line.endswith(r"\\")]
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", tex)[1])
    assert {line.count(" & ") for line in lines} == {columns - 1} and columns == table[0].count("|") - 1
    assert len(lines) == len(table) - 1, "the same rows, without the rule"
    assert not re.search(r"(?<!\\)[%_#]", tex) and tex.count("$") % 2 == 0
    assert tex.startswith(r"\begin{tabular}") and tex.endswith("\\bottomrule\n\\end{tabular}\n")
    assert [tex.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 3, 1]
    assert only_bars(done.stderr)


def test_cells():
    rows = [
        {"pruner": "a_b", "sparsity": "50", "seeds": "2", "all %": (50.04, 0.25)},
        {"pruner": "c", "sparsity": "75", "seeds": "-", "all %": (75.0, None)},
    ]
    assert "| a_b    |       50 |     2 | 50.0 ± 0.2 |" in markdown(rows)
    assert r"a\_b & 50 & 2 & 50.0 $\pm$ 0.2 \\" in latex(rows) and r"c & 75 & - & 75.0 \\" in latex(rows)


def test_table_is_the_mean_of_the_rows(whole):
    rows = results(whole[0])
    shares = [float(r["vision %"]) for r in rows if (r["pruner"], r["sparsity"]) == ("rand", "75")]
    mean, error = mean_and_error(shares)
    line = next(t for t in (whole[0] / "table.md").read_text().split("\n") if re.match(r"\| rand +\| +75 ", t))
    assert line.split("|")[4].strip() == f"{mean:.1f} ± {error:.1f}"


def test_what_is_shared():
    names = ("omp", "snip", "multiflow", "itersnip", "lamp", "rand")
    chosen = {name: Entry(pruners.build(name)) for name in names}
    assert sharing(chosen) == [["omp", "lamp", "rand"], ["snip", "itersnip"], ["multiflow"]]
    assert {name for name in chosen if seeds_of(chosen[name], [1, 2]) == [ANY_SEED]} == {"omp", "lamp"}


@pytest.mark.parametrize("name", pruners.available())
def test_what_draws_nothing_gives_the_same_masks_under_all_seeds(name):
    engine = pruners.build(name)
    if engine.plan.statistics:
        return
    view = xvlm.prunable_view(xvlm.build(load_config(CONFIGS / "model.yaml", xvlm.Config)))
    digests = {next(iter(engine.prune(view, None, ["0.5"], seed=seed)))[1].digest() for seed in (1, 2)}
    assert len(digests) == (2 if engine.plan.score.draws else 1)


def test_rows_that_another_version_wrote_are_left_alone(tmp_path):
    path = tmp_path / "results.csv"
    columns = {"top-1": "top1"}
    ledger = Ledger(path, "m", ["v"], columns, {"omp": "one"})
    ledger.add("omp", "50", "-", {"v": 0.5, "all": 0.5}, {"top1": 1.0}, Cost())
    assert Ledger(path, "m", ["v"], columns, {"omp": "one"}).find("omp", "50", "-") is not None
    assert Ledger(path, "m", ["v"], columns, {"omp": "two"}).find("omp", "50", "-") is None


# Bad input


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["-p", "omp,multiflo"], "no pruner 'multiflo', did you mean 'multiflow'?"),
        (["-p", ""], "no pruner ''"),
        (["-s", "63,0"], "got '0'"),
        (["--seeds", "1,x"], "--seeds: expected an integer from 0 to 2^32 - 1, got 'x'"),
        (["--k_test", "-1"], "--k_test: expected an integer of at least 0, got '-1'"),
        (["--seed", "1"], "did you mean --seeds?"),
        (["--output_dir", "README.md"], "--output_dir README.md: "),
        (["--weights", "absent.pth"], "absent.pth: weights file not found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_before_heavy_imports(tmp_path, without_torch, given, told):  # noqa: F811
    assert told in early(["compare.py", *options(tmp_path / "out", *given)], without_torch)
    assert not list(tmp_path.iterdir())


def test_help_names_all_defaults(without_torch):  # noqa: F811
    done = subprocess.run([sys.executable, "compare.py", "--help"], capture_output=True, text=True, env=without_torch)
    assert done.returncode == 0, done.stderr
    for option in re.split(r"\n  (?=-)", done.stdout)[2:]:
        assert "default" in option or option.startswith("-m"), option
