"""The loss against a teacher, the weights of one, and outputs of task models."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from configs.loading import load_config
from engine.options.sparse_training import SparseOptions
from engine.sparse_training.distillation import distillation
from engine.sparse_training.taught import Taught
from engine.sparse_training.training import SparseTraining, load_teacher
from models.dino import classification
from models.dino import model as dino
from models.parts.vqa import by_question
from sparsity.errors import UserError
from tests.test_scripts import CONFIGS

SIZES = load_config(CONFIGS / "dino_model.yaml", dino.Config)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(4, 3, SIZES.image_size, SIZES.image_size, generator=generator)
    return {"image": image, "label": torch.arange(4) % SIZES.classes}


@pytest.fixture
def view():
    torch.manual_seed(0)
    return classification.prunable_view(classification.build(SIZES))


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return classification.build(SIZES)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_gradient_is_that_of_the_loss_written_out(view, teacher, weight):
    naive = copy.deepcopy(view.model)
    losses = Taught(view, teacher, weight)(batch())
    losses["loss"].backward()
    with torch.no_grad():
        wanted = teacher.features(batch()["image"])
        target = (teacher.classifier(wanted) / 2).softmax(-1)
    features = naive.features(batch()["image"])
    logits = naive.classifier(features)
    divergence = 4 * (target * (target.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
    states = ((features - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    task = F.cross_entropy(logits, batch()["label"])
    ((1 - weight) * task + weight * (divergence + states)).backward()
    torch.testing.assert_close(losses["distill"], divergence + states)
    own, expected = gradients(view.model), gradients(naive)
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_teacher_is_neither_changed_nor_trained_nor_saved(view, teacher):
    before = copy.deepcopy(teacher.state_dict())
    model = Taught(view, teacher, 0.5)
    model.train()
    assert not teacher.training and view.model.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(batch())["loss"].backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert {id(p) for p in model.parameters()} == {id(p) for p in view.model.parameters()}
    assert model.state_dict().keys() == view.model.state_dict().keys()
    model.load_state_dict(before)
    assert torch.equal(view.model.classifier.weight, before["classifier.weight"])


def test_without_a_task_no_label_is_read(view, teacher):
    losses = Taught(view, teacher, 1.0)({"image": batch()["image"]})
    assert losses["loss"] is losses["distill"]


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(view):
    losses = Taught(view, copy.deepcopy(view.model), 1.0)(batch())
    assert losses["loss"].item() == pytest.approx(0, abs=1e-6)


def test_one_pass_gives_what_two_give(view):
    model = view.model.eval()
    losses, outputs = model.taught(batch(), 0.0, view.outputs)
    assert torch.equal(losses["loss"], model(batch())["loss"])
    assert outputs.keys() == view.outputs(batch()).keys()


def training(view, **options):
    return SparseTraining(SparseOptions(**options), view, classification.NEW, 0, torch.device("cpu"))


def test_a_new_head_teaches_nothing(view, tmp_path):
    taught = training(view, distill=0.5).module()
    assert taught.untaught == ("logits",)
    taught(batch())["distill"].backward()
    assert view.model.classifier.weight.grad is None and view.model.vit.layernorm.weight.grad is not None
    with pytest.raises(ValueError, match="--distill 1: .*no logits to teach.*--teacher FILE"):
        training(view, distill=1.0).module()
    save_file(view.model.state_dict(), tmp_path / "m.safetensors")
    assert training(view, distill=1.0, teacher=tmp_path / "m.safetensors").module().untaught == ()


def test_where_nothing_is_left_to_teach_it_is_refused(view):
    names = tuple(view.outputs(batch()))
    with pytest.raises(UserError, match="--distill: .*the head is new.*give --teacher FILE"):
        Taught(view, copy.deepcopy(view.model), 0.5, untaught=names)(batch())


def test_the_weights_of_a_teacher(view, teacher, tmp_path):
    save_file(teacher.state_dict(), tmp_path / "model.safetensors")
    torch.save({"model": teacher.state_dict()}, tmp_path / "best.pt")
    for name in ("model.safetensors", "best.pt"):
        copied = copy.deepcopy(view.model)
        load_teacher(copied, tmp_path / name)
        assert all(torch.equal(t, teacher.state_dict()[key]) for key, t in copied.state_dict().items())
    (tmp_path / "other.pt").write_bytes(b"no weights")
    torch.save({"step": 1}, tmp_path / "empty.pt")
    save_file({"a": torch.ones(1)}, tmp_path / "another.safetensors")
    for name, told in (
        ("other.pt", "no weights can be read"),
        ("empty.pt", "no checkpoint of a run"),
        ("another.safetensors", "weights of another model or task: vit"),
    ):
        with pytest.raises(ValueError, match=f"--teacher .*{name}: {told}"):
            load_teacher(view.model, tmp_path / name)


def test_each_question_counts_once():
    """Whatever the number and the order of its answers; as the means written out."""
    atts = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    owner = torch.tensor([2, 0, 2, 0])
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    given = {"answer_atts": atts, "answer_owner": owner, "text_ids": torch.zeros(3, 2)}
    loss = distillation(by_question(student, given), by_question(teacher, given))["loss"]
    target, log = (teacher / 2).softmax(-1), nn.LogSoftmax(-1)
    each = 4 * (target * (target.log() - log(student / 2))).sum(-1)  # tokens of answers 0, 0, 1, 2, 2, 2, 3, 3
    expected = (
        torch.stack([each[[2, 6, 7]].mean(), torch.zeros((), dtype=torch.float64), each[[0, 1, 3, 4, 5]].mean()])
    ).mean()
    torch.testing.assert_close(loss, expected)
