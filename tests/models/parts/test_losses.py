"""Features gathered over two processes: values, order and gradients, also where the ranks have unequal batches."""

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional as F

from models.parts.losses import box_losses, contrastive_loss, draw_negatives, gather_features, own_rows

TEMP = torch.tensor(0.1)
SIZES = ([3, 3], [2, 5], [4, 1])


def features(size):
    """All ranks' features (B0 + B1, 4), images and texts, and the ids of the samples, some of which are equal."""
    generator = torch.Generator().manual_seed(size)
    image, text = (F.normalize(torch.randn(size, 4, generator=generator), dim=1) for _ in range(2))
    return image, text, torch.arange(size) % 4


def one_rank(rank, address, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for number, sizes in enumerate(SIZES):
        image, text, ids = (part.split(sizes)[rank] for part in features(sum(sizes)))
        image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
        every = [gather_features(part) for part in (image, text, ids)]
        loss = contrastive_loss(every[0], every[1], TEMP, every[2])
        loss.backward()
        found = [part.detach() for part in (*every, loss)]
        torch.save([*found, image.grad, text.grad], f"{results}/{number}_{rank}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered")
    address = f"file://{folder}/store"
    multiprocessing.spawn(one_rank, (address, str(folder)), nprocs=2)
    return [[torch.load(folder / f"{number}_{rank}") for rank in range(2)] for number in range(len(SIZES))]


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_every_rank_has_all_rows_in_rank_order(gathered, number):
    for rank in range(2):
        for actual, expected in zip(gathered[number][rank][:3], features(sum(SIZES[number])), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_loss_and_mean_gradient_are_those_of_one_process(gathered, number):
    """DDP averages gradients over ranks: each rank's must be ranks times its part of the whole gradient."""
    image, text, ids = features(sum(SIZES[number]))
    image, text = image.requires_grad_(), text.requires_grad_()
    loss = contrastive_loss(image, text, TEMP, ids)
    loss.backward()
    for rank in range(2):
        *_, own_loss, image_grad, text_grad = gathered[number][rank]
        torch.testing.assert_close(own_loss, loss.detach())
        torch.testing.assert_close(image_grad / 2, image.grad.split(SIZES[number])[rank])
        torch.testing.assert_close(text_grad / 2, text.grad.split(SIZES[number])[rank])


def test_without_processes_features_are_their_own():
    image, _, _ = features(3)
    assert gather_features(image) is image


def test_contrastive_loss_is_the_formula():
    image, text, _ = features(5)
    logits = image @ text.t() / TEMP
    rows = -sum(logits[i].log_softmax(0)[i] for i in range(5)) / 5
    columns = -sum(logits[:, i].log_softmax(0)[i] for i in range(5)) / 5
    torch.testing.assert_close(contrastive_loss(image, text, TEMP), (rows + columns) / 2)


def test_boxes_of_whole_images_do_not_count():
    target = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.3, 0.4, 0.2, 0.2]])
    predicted = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.3, 0.4, 0.2, 0.4]])
    l1, giou = box_losses(predicted, target, torch.tensor([1, 0]))
    assert l1.item() == pytest.approx(0.2)
    assert giou.item() == pytest.approx(0.5)  # half of the predicted box, nothing outside it
    assert box_losses(predicted, target, torch.tensor([1, 1]))[0] == 0
    assert torch.stack(box_losses(target, target, torch.tensor([0, 0]))).abs().max() < 1e-6


def longer_text(rank, address, results):
    """Texts (B, T, 2) of unequal number and length, and where the own ones stand."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    states = torch.full((2 + rank, 3 - rank, 2), float(rank + 1), requires_grad=True)
    every = gather_features(states)
    own = own_rows(len(states))
    (every[own] * (rank + 1)).sum().backward()
    torch.save([every.detach(), own, states.grad], f"{results}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_texts_of_unequal_length_are_padded(tmp_path):
    multiprocessing.spawn(longer_text, (f"file://{tmp_path}/store", str(tmp_path)), nprocs=2)
    expected = torch.zeros(5, 3, 2)
    expected[:2], expected[2:, :2] = 1.0, 2.0
    for rank, own in enumerate(([0, 1], [2, 3, 4])):
        every, found, gradient = torch.load(tmp_path / str(rank))
        assert torch.equal(every, expected) and found.tolist() == own
        assert (gradient == rank + 1).all()


def test_negatives_are_drawn_from_a_pool():
    similarity = torch.zeros(2, 5)
    similarity[0, 3] = similarity[1, 4] = 30.0  # by far the most alike, but the same sample in row 0
    ids, pool = torch.tensor([7, 8]), torch.tensor([7, 8, 9, 7, 6])
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        images, texts = draw_negatives(similarity, similarity, ids, pool, floor=1e-5, generator=generator)
        assert images[1] == texts[1] == 4
        assert images[0] in (1, 2, 4) and texts[0] in (1, 2, 4)
    assert draw_negatives(similarity, similarity, torch.tensor([7, 7]), torch.full((5,), 7), floor=1e-5) is None
