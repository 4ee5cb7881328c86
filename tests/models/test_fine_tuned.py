"""Fine-tuned models from their weights alone."""

from dataclasses import replace

import pytest
import torch

import models
from engine.export import save_weights
from models.checkpoint import image_size_of
from models.fine_tuned import load_task
from models.parts.graphs import graphs_of
from tests.conftest import BLIP_CONFIG, CONFIG

SIZES = {"xvlm": CONFIG, "blip": BLIP_CONFIG}


@pytest.mark.parametrize("side", [48, 80])
@pytest.mark.parametrize("task", ["retrieval", "vqa"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.script
def test_weights_say_what_images_they_were_tuned_on(name, task, side, tmp_path):
    torch.manual_seed(0)
    pretrained = SIZES[name]
    tuned = replace(pretrained, vision=replace(pretrained.vision, image_size=side))
    tuned = replace(tuned, text=replace(tuned.text, width=tuned.vision.width)) if task == "vqa" else tuned
    model = models.find_task(name, task).build(tuned).eval()
    path = save_weights(model, tmp_path / "model.safetensors")
    assert image_size_of(path, models.find(name).POSITIONS, 16) == side
    view, sizes, found = load_task(name, task, replace(pretrained, text=tuned.text), tmp_path)
    assert found == side and sizes == tuned
    state = view.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    parts = {graph.name: graph for graph in graphs_of(view.model, found)}
    assert set(parts) == ({"vision", "question", "step"} if task == "vqa" else {"vision", "text", "match"})
    image = parts["vision"].random(2, 0)
    assert image["image"].shape == (2, 3, side, side)


def test_the_parts_of_a_model_that_answers_make_up_its_loss():
    """Running the parts one after the other gives the log-probabilities that the model ranks answers by."""
    torch.manual_seed(0)
    config = replace(BLIP_CONFIG, text=replace(BLIP_CONFIG.text, width=BLIP_CONFIG.vision.width))
    model = models.find_task("blip", "vqa").build(config).eval()
    parts = {graph.name: graph for graph in graphs_of(model)}
    image, question = parts["vision"].random(3, 1)["image"], parts["question"].random(3, 2)
    ids, atts = question["ids"], question["atts"]
    answers = torch.tensor([[5, 9, 3], [5, 20, 3]])
    with torch.no_grad():
        states = parts["question"].module(parts["vision"].module(image), ids, atts)
        first = parts["step"].module(answers[:1, :1].expand(3, 1), states, atts)
        expected = model.first_tokens(states, atts, answers)
        torch.testing.assert_close(first.log_softmax(1)[:, answers[:, 1]], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(states, model.ask(model.encode_image(image), ids, atts))


def test_weights_without_a_position_table_say_nothing(tmp_path):
    path = save_weights(torch.nn.Linear(2, 2), tmp_path / "w.safetensors")
    assert image_size_of(path, ("pos_embed",), 16) is None
