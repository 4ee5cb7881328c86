"""--help of every script: an example, defaults, subjects; one spelling is as good as the other."""

import importlib
from pathlib import Path

import pytest

from engine.options.command_line import Parser

SCRIPTS = sorted(path.stem for path in Path(__file__).resolve().parents[3].glob("*.py"))


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a script, without its arguments."""

    def build(script):
        built = []
        monkeypatch.setattr(Parser, "parse_args", lambda self, *_: built.append(self) or exit())
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse([])
        return built[0]

    return build


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_an_example_and_every_default(script, parser_of):
    parser = parser_of(script)
    assert f"\n    python {script}.py " in parser.description
    subjects = {action.dest: group.title or "" for group in parser._action_groups for action in group._group_actions}
    for action in parser._actions:
        named = action.option_strings and not action.required and action.dest != "help"
        told = f"{action.help} {subjects[action.dest]}"
        assert not named or "default" in told or action.dest == "pruner", f"{action.option_strings}: {told}"
    assert len(set(subjects.values())) > 1, "grouped by subject"


def test_dashes_and_underscores_are_the_same(capsys):
    parser = Parser("")
    parser.add_argument("--num_batches", type=int, default=1)
    parser.add_argument_group("other").add_argument("--save-model", default="")
    assert parser.parse_args(["--num-batches", "3", "--save_model=a-b_c"]).__dict__ == {
        "num_batches": 3,
        "save_model": "a-b_c",
    }
    with pytest.raises(SystemExit):
        parser.parse_args(["--num-batch", "3"])
    assert "unrecognized argument --num-batch, did you mean --num_batches?" in capsys.readouterr().err
