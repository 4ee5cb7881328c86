"""The project's own recipes: what a script is given, written down and read again."""

import pytest

import prune
from engine.launch import run
from engine.options.command_line import Parser
from engine.recipes.expand import Recipe, recipe_options
from engine.recipes.own import NAME, SCRIPTS, read_stages
from engine.recipes.reading import read_document
from sparsity.errors import UserError

TWO = """\
prune:
  model: timm:test_vit
  pattern: 2:4
  evaluate: true
  save_model: no
  exclude: [head, "*.fc1"]
  group_sparsity: {vision: 70, text: 0.5}
retrieval:
  model: xvlm
again:
  script: prune
  sparsities: [50, 75.5]
"""


def write(folder, text, name="r.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_options_are_as_they_would_be_typed(tmp_path):
    options = recipe_options(f"{write(tmp_path, TWO)}:prune", "prune")
    given = {option.name: option.text for option in options}
    assert given == {
        "model": "timm:test_vit",
        "pattern": "2:4",  # not a number to the base of 60
        "evaluate": None,
        "exclude": "head,*.fc1",
        "group_sparsity": "vision=70,text=0.5",
    }
    assert [option.where.rpartition(":")[2] for option in options] == ["2", "3", "4", "6", "7"]
    assert [option.text for option in recipe_options(f"{write(tmp_path, TWO)}:again", "prune")] == ["50,75.5"]
    assert recipe_options(write(tmp_path, TWO), "retrieval")[0].text == "xvlm"


def test_what_is_typed_comes_after_the_recipe(tmp_path):
    text = "prune: {model: timm:test_vit, pruner: omp, sparsities: 50, epochs: 3, schedule: cubic, min_keep: 0.1}"
    args = prune.parse(["--recipe", write(tmp_path, text), "-s", "60", "--schedule", "exp"])
    assert (args.model, args.pruner, args.sparsities, args.epochs) == ("timm:test_vit", "omp", "60", 3)
    assert args.plan == {"epochs": 3, "schedule": "exp", "min_keep": 0.1}, "as if all of it were typed"
    assert args.recipe.options["sparsities"] == "60"


def test_a_saved_recipe_is_the_command_line(tmp_path):
    typed = ["-m", "timm:test_vit", "-p", "wanda", "--pattern", "2:4", "--exclude=*.fc1,head", "--evaluate"]
    typed += ["--model_kwargs", "depth=2", "--calibration", "a folder: with ' and #", "--damp=1e-3", "-e", "2"]
    args = prune.parse(typed)
    args.recipe.save(tmp_path)
    again = prune.parse(["--recipe", str(tmp_path / NAME)])
    assert vars(again) == vars(args)


def test_options_of_several_values(tmp_path):
    parser = Parser("", "image_classification")
    parser.add_argument("--scale", type=float, nargs=2)
    args = parser.parse_args(["--recipe", write(tmp_path, "image_classification: {scale: [0.1, 1.0]}")])
    args.recipe.save(tmp_path)
    assert args.scale == [0.1, 1.0] == parser.parse_args(["--recipe", str(tmp_path / NAME)]).scale
    with pytest.raises(UserError, match=r"r\.yaml:1: scale: expected 2 values, got 1"):
        parser.parse_args(["--recipe", write(tmp_path, "image_classification: {scale: 0.1}")])


def test_stages_of_the_mask_stand_above_those_of_its_training(tmp_path):
    (tmp_path / "pruned").mkdir(), (tmp_path / "result").mkdir()
    Recipe("prune", {"model": "xvlm", "sparsities": "50"}).save(tmp_path / "pruned")
    mask = tmp_path / "pruned" / "masks.safetensors"
    Recipe("retrieval", {"model": "xvlm", "mask": str(mask)}).save(tmp_path / "result", mask)
    stages = read_stages(read_document(tmp_path / "result" / NAME))
    assert [(name, script) for name, (script, _) in stages.items()] == [("prune", "prune"), ("retrieval", "retrieval")]
    Recipe("prune", {"model": "xvlm", "from_mask": str(mask)}).save(tmp_path / "result", mask)
    assert list(read_stages(read_document(tmp_path / "result" / NAME))) == ["prune"], "a stage is not written twice"
    (tmp_path / "pruned" / NAME).write_text("prune: [")
    Recipe("retrieval", {"model": "xvlm"}).save(tmp_path / "result", mask)
    assert list(read_stages(read_document(tmp_path / "result" / NAME))) == ["retrieval"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prune:\n  modle: x\n", "r.yaml:2: prune.py has no option 'modle', did you mean model?"),
        (
            "prune:\n  model: x\n  sparsities: 50\n  epochs: many\n",
            "r.yaml:4: epochs: expected an integer of at least 1",
        ),
        ("prune:\n  schedule: quintic\n", "r.yaml:2: schedule: invalid choice: 'quintic'"),
        ("prune:\n  evaluate: 3\n", "r.yaml:2: evaluate: expected true or false"),
        ("prune:\n  model: true\n", "r.yaml:2: model: expected a value"),
        ("prune:\n  model:\n", "r.yaml:2: expected a value"),
        ("prune:\n  model: x\n  model: y\n", "r.yaml:3: not valid YAML: the key 'model' stands twice"),
        ("prune:\n  recipe: other.yaml\n", "r.yaml:2: prune.py has no option 'recipe'"),
        ("prune:\n  model: [a, [b]]\n", "r.yaml:2: expected a value"),
        ("trian: {model: x}\n", "r.yaml:1: model: neither a modifier nor a group of them; stages of our own are named"),
        ("prune: 3\n", "r.yaml:1: expected the options of prune, keys and values"),
        ("prune: {}\ntrian:\n  model: x\n", "r.yaml:2: there is no script 'trian' that takes recipes"),
        ("one: {script: prune}\ntwo: {script: prune}\n", "r.yaml: stages one, two: say which, --recipe "),
        ("retrieval: {model: xvlm}\n", "r.yaml: there is no stage of prune.py; there are: retrieval"),
        ("prune: [\n", "r.yaml:2: not valid YAML"),
        ("", "r.yaml: the recipe is empty"),
    ],
)
def test_errors_name_the_line(tmp_path, capsys, text, told):
    with pytest.raises(SystemExit) as caught:
        run(lambda: prune.main(["--recipe", write(tmp_path, text)]))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and line.startswith("error: ")


def test_files_and_stages_that_are_not_there(tmp_path):
    for named, told in {
        str(tmp_path / "absent.yaml"): "there is no such file",
        f"{write(tmp_path, TWO)}:third": "there is no stage 'third'; there are: prune, retrieval, again",
        f"{write(tmp_path, TWO)}:retrieval": "stage retrieval is for retrieval.py, not prune.py",
    }.items():
        with pytest.raises(UserError, match=told):
            recipe_options(named, "prune")


def test_scripts_that_take_recipes_are_there():
    for script in SCRIPTS:
        __import__(script)
