"""The pruning part of recipes of SparseML and llm-compressor, as options of our scripts."""

import logging

import pytest

from engine.options.command_line import Parser
from engine.recipes.expand import recipe_options
from sparsity.errors import UserError


def options(folder, text, script="prune", stage="", epochs=None, name="r.yaml"):
    (folder / name).write_text(text)
    found = recipe_options(f"{folder / name}{stage}", script, epochs)
    return {option.name: option.text for option in found}


TRAINED = """\
num_epochs: &num_epochs 10
training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: *num_epochs

pruning_modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.0
    final_sparsity: 0.85
    start_epoch: 1.0
    end_epoch: 8.0
    update_frequency: 0.5
    inter_func: cubic
    mask_type: unstructured
    leave_enabled: True
    log_types: __ALL__
"""


def test_a_gradual_modifier_in_training(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    expected = {"gradual": "0.85", "gradual_score": "localmp", "prune_from": "0.1", "prune_until": "0.8"}
    expected |= {"epochs": "10"}
    assert options(tmp_path, TRAINED, "retrieval") == expected
    assert "r.yaml:14: update_frequency: how often masks are made is --prune_every" in caplog.text
    overall = TRAINED.replace("!GMPruning", "!GlobalMagnitudePruning")
    assert options(tmp_path, overall, "retrieval")["gradual_score"] == "omp"


def test_a_gradual_modifier_in_one_shot(tmp_path):
    assert options(tmp_path, TRAINED) == {"pruner": "magnitude", "sparsities": "0.85"}


def test_the_front_of_a_markdown_file(tmp_path):
    text = f"<!-- a licence -->\n\n---\n{TRAINED}---\n\n# How to\n\n---\nmore\n"
    assert options(tmp_path, text, name="r.md") == {"pruner": "magnitude", "sparsities": "0.85"}
    with pytest.raises(UserError, match=r"r\.md:18: inter_func: sparsity rises as a cubic"):
        options(tmp_path, text.replace("cubic", "linear"), name="r.md")


def test_modifiers_that_differ_in_their_layers_are_one_run(tmp_path):
    first = TRAINED.replace("__ALL_PRUNABLE__", "[layers.0.fc.weight, 're:.*attn.*weight']")
    second = first[first.index("  - !GM") :].replace("layers.0.fc", "head")
    found = options(tmp_path, first + second)
    assert found == {"pruner": "magnitude", "sparsities": "0.85", "include": "layers.0.fc,re:.*attn.*weight,head"}
    with pytest.raises(UserError, match=r"r\.yaml:19: GMPruningModifier asks for something else than .*r\.yaml:8"):
        options(tmp_path, first + second.replace("0.85", "0.9"))
    with pytest.raises(UserError, match=r"r\.yaml:8: GMPruningModifier: --gradual prunes all layers"):
        options(tmp_path, first, "retrieval")


def changed(old, new):
    return TRAINED.replace(old, new)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (changed("!EpochRange", "!SetLearningRate"), "3: SetLearningRateModifier is no modifier that prunes"),
        (changed("mask_type: unstructured", "mask_type: block"), "16: mask_type: unstructured here"),
        (changed("leave_enabled: True", "leave_enabled: False"), "17: leave_enabled: masks are held to the end"),
        (changed("log_types", "prune_often"), "18: prune_often of GMPruningModifier is not understood"),
        (changed("    final_sparsity: 0.85\n", ""), "8: GMPruningModifier needs final_sparsity"),
        (changed("0.85", "{0.8: [a]}"), "11: expected a number"),
        (changed("0.85", "eval(0.5 + 0.35)"), "11: eval(0.5 + 0.35): expressions are not computed"),
        (changed("0.85", "lots"), "11: expected a number"),
        (changed("0.85", "85"), "11: final_sparsity: expected a fraction between 0 and 1"),
        (changed("__ALL_PRUNABLE__", "['re:(']"), "9: re:(: no regular expression"),
        (changed("__ALL_PRUNABLE__", "Conv2d"), "9: Conv2d: a class of layers: give their names"),
        (changed("__ALL_PRUNABLE__", "'re:a{1,2}'"), "9: re:a{1,2}: a pattern with a comma"),
    ],
)
def test_what_is_not_understood_is_an_error_that_names_the_line(tmp_path, text, told):
    with pytest.raises(UserError) as caught:
        options(tmp_path, text, "retrieval")
    assert str(caught.value).startswith(f"{tmp_path}/r.yaml:{told}")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("init_sparsity: 0.0", "init_sparsity: 0.05", "pruning begins with what --mask has: prune.py -s 5 makes one"),
        ("end_epoch: 8.0", "end_epoch: 12", "it must begin before it ends, within 10 epochs"),
        ("- !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: *num_epochs", "[]", "of how many epochs?"),
    ],
)
def test_a_schedule_that_cannot_be(tmp_path, old, new, told):
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        options(tmp_path, TRAINED.replace("  " + old, "  " + new if new != "[]" else "  []"), "retrieval")


STAGES = """\
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      sequential_update: true
      dampening_frac: 0.001
      block_size: 128
      targets: ["Linear"]
      ignore: ["re:.*lm_head"]
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier:
      targets: ['re:.*q_proj.weight']
      start: 0
"""


def test_stages_are_for_the_script_that_does_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert options(tmp_path, STAGES) == {
        "pruner": "sparsegpt",
        "enable_update": None,
        "pattern": "2:4",
        "exclude": "re:.*lm_head",
        "damp": "0.001",
        "calibration_mode": "sequential",
    }
    assert "r.yaml:15: ConstantPruningModifier is for a script that trains" in caplog.text
    assert options(tmp_path, STAGES, "captioning") == {}
    assert "r.yaml:15: ConstantPruningModifier: the mask of --mask is held in any case" in caplog.text


def test_a_stage_is_named_where_there_are_several(tmp_path):
    text = STAGES + STAGES.replace("sparsity_stage", "next_stage").replace('"2:4"', '"0:0"').replace(
        "finetuning_stage", "last_stage"
    )
    with pytest.raises(UserError, match=r"r\.yaml:21: .*:STAGE, or make two recipes of it"):
        options(tmp_path, text)
    assert options(tmp_path, text, stage=":next_stage")["sparsities"] == "0.5"
    with pytest.raises(UserError, match="there is no stage 'third'; there are: sparsity_stage, finetuning_stage, next"):
        options(tmp_path, text, stage=":third")


def test_what_is_counted_there_is_pruned_and_here_is_kept(tmp_path):
    text = STAGES.replace('"2:4"', '"1:4"').replace("sparsity: 0.5", "sparsity: 0.25")
    assert options(tmp_path, text)["pattern"] == "3:4"


def test_quantisation_is_refused_unless_another_stage_is_named(tmp_path):
    text = STAGES + "quant_stage:\n  quant_modifiers:\n    GPTQModifier: {bits: 4}\n"
    with pytest.raises(
        UserError, match=r"r\.yaml:20: GPTQModifier is no modifier that prunes .* take it out; of several"
    ):
        options(tmp_path, text)
    assert options(tmp_path, text, stage=":sparsity_stage")["pattern"] == "2:4"


WANDA = """\
test_stage:
  obcq_modifiers:
    WandaPruningModifier:
      sparsity: 0.7
      sparsity_profile: owl
      owl_m: 5
      owl_lmbda: 0.08
      targets: [model.layers.0, 're:.*attn.*']
      sequential_update: false
"""


def test_wanda_with_owl(tmp_path):
    assert options(tmp_path, WANDA) == {
        "pruner": "wanda",
        "sparsities": "0.7",
        "include": "model.layers.0,re:.*attn.*",
        "calibration_mode": "dense",
        "allocation": "owl",
    }


def test_magnitude_takes_the_epochs_of_the_command_line(tmp_path):
    text = "MagnitudePruningModifier: {init_sparsity: 0, final_sparsity: 0.8, start: 0, end: 5, targets: __ALL__}"
    (tmp_path / "r.yaml").write_text(text)
    parser = Parser("", "retrieval")
    for name in ("gradual", "gradual_score", "prune_from", "prune_until", "epochs"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args(["--recipe", str(tmp_path / "r.yaml"), "--epochs", "10"])
    assert (args.gradual, args.gradual_score, args.prune_from, args.prune_until) == ("0.8", "localmp", "0", "0.5")


def test_blocks_of_weights(tmp_path):
    text = "MagnitudePruningModifier: {init_sparsity: 0, final_sparsity: 0.8, end: 2, mask_structure: 'block_4,2'}"
    assert options(tmp_path, text) == {"pruner": "magnitude", "pattern": "block4x2", "sparsities": "0.8"}
    with pytest.raises(UserError, match=r"r\.yaml:1: .* prunes single weights, not block4x2"):
        options(tmp_path, text, "retrieval", epochs="4")
    with pytest.raises(UserError, match=r"r\.yaml:1: mask_structure: unstructured, or block_R,C"):
        options(tmp_path, text.replace("block_4,2", "channel"))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("sparsity: 0.7", "sparsity: [0.7, 0.8]", "4: expected a number"),
        ("sparsity: 0.7", "sparsity: 0.0", "4: WandaPruningModifier: expected a sparsity between 0 and 1"),
        ("owl_m: 5", "owl_m: 7", "6: owl_m: --allocation owl has 5"),
        ("sequential_update: false", "mask_structure: '2:4'", "4: sparsity: mask_structure 2:4 prunes 2 of 4"),
        ("sequential_update: false", "mask_structure: '4:2'", "9: mask_structure: pattern must be N:M"),
        ("sequential_update: false", "quantize: true", "9: quantize of WandaPruningModifier is not understood"),
        ("model.layers.0,", "LlamaDecoderLayer,", "8: LlamaDecoderLayer: a class of layers"),
        (
            "test_stage:\n",
            "test_stage:\n  speed: 3\n",
            "2: speed: neither a modifier nor a group of them; stages of our own",
        ),
        ("test_stage:\n", "test_stage:\n  run_type: dry\n", "2: run_type: expected oneshot or train, got dry"),
        ("test_stage:\n", "version: 1\ntest_stages: [1]\ntest_stage:\n", "2: test_stages: expected a stage"),
    ],
)
def test_llm_compressor_errors_name_the_line(tmp_path, old, new, told):
    with pytest.raises(UserError) as caught:
        options(tmp_path, WANDA.replace(old, new))
    assert str(caught.value).startswith(f"{tmp_path}/r.yaml:{told}")


def test_a_recipe_with_nothing_for_a_script(tmp_path):
    with pytest.raises(UserError, match="nothing in it is for captioning.py"):
        options(tmp_path, WANDA, "captioning")
    with pytest.raises(UserError, match=r"nothing in it is for prune\.py"):
        options(tmp_path, "ConstantPruningModifier: {targets: __ALL__}")
