"""Numbers that become NaN or infinite, and files that were cut short: named in one line, and nothing of it is saved."""

import pytest
import torch

import retrieval
from engine.launch import run
from engine.training.fit import fit
from tests.engine.training.test_fit import batches, make, train
from tests.test_finetuning import changed, options, trunk, tuned  # noqa: F401


def finite(path):
    return all(tensor.isfinite().all() for tensor in torch.load(path, weights_only=True)["model"].values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("step", [7, 13])
def test_weights_that_turn_out_not_finite(tmp_path, injected, value, step):
    """Also in the last step, after which there is no loss any more."""
    injected("a weight that is not finite")
    training = make(tmp_path, save_every=1)

    def spoil(*_):
        done.append(1)
        if len(done) == step:
            with torch.no_grad():
                training.model.layers[3].weight[0, 0] = value

    done = []
    training.optimizer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(ValueError, match=rf"NaN or infinite at step {step}: layers.3.weight; it is not saved"):
        fit(training, batches(0), 0)
    assert finite(tmp_path / "last.pt") and make(tmp_path).resume() == step - 1


def test_moments_that_turn_out_not_finite(tmp_path, injected):
    injected("a moment of the optimizer that is not finite")
    training = make(tmp_path)
    fit(training, batches(0), 0, stop=3)
    next(iter(training.optimizer.optimizer.state.values()))["exp_avg"].fill_(torch.inf)
    with pytest.raises(ValueError, match=r"NaN or infinite at step 3: optimizer.state.0.exp_avg"):
        training.save(3)


def test_gradients_that_are_not_finite(tmp_path, injected):
    injected("a gradient that is not finite")
    training = make(tmp_path, save_every=1)
    training.model.layers[0].weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite at step 1: .*layers.0.weight"):
        fit(training, batches(0), 0)
    assert not (tmp_path / "last.pt").exists()


def test_a_rate_that_is_far_too_high(tmp_path, trunk, capfd, injected):  # noqa: F811
    """Hard negatives are drawn by similarities that are NaN then."""
    injected("retrieval that diverges")
    config = changed(tmp_path, optimizer={"lr": 1e30}, clip_norm=0.0)
    with pytest.raises(SystemExit) as ended:
        run(lambda: retrieval.main(options(tmp_path / "out", trunk, config=config)))
    told = capfd.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "try a lower lr" in told and "Traceback" not in told
    assert not (tmp_path / "out" / "last.pt").exists() or finite(tmp_path / "out" / "last.pt")


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_truncated_checkpoint(tmp_path, injected, name):
    injected(f"{name} cut short")
    options = {"validate": lambda: {"r": 1.0}, "validate_every": 4, "select": "r"}
    train(make(tmp_path, **options))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name}: not a readable checkpoint .*truncated.*delete it"):
        make(tmp_path, **options).resume()


def test_best_weights_of_another_run_are_refused(tmp_path, injected):
    injected("best.pt of another run")
    options = {"validate": lambda: {"r": 1.0}, "validate_every": 4, "select": "r"}
    train(make(tmp_path / "one", **options))
    train(make(tmp_path / "two", **options, identity={"training": {"lr": 0.2}}))
    (tmp_path / "two" / "best.pt").replace(tmp_path / "one" / "best.pt")
    with pytest.raises(ValueError, match="best.pt: holds the weights of another run"):
        make(tmp_path / "one", **options).resume()
    with pytest.raises(ValueError, match="best.pt: holds the weights of another run"):
        run_of_one = make(tmp_path / "one", **options)
        run_of_one.best = {"step": 4, "value": 1.0}
        run_of_one.load_best()


def test_a_validation_that_was_cut_off_is_done_before_the_next_step(tmp_path, injected):
    """And where the best weights were written already, they are taken with the metrics that they were written with."""
    injected("killed in and after a validation", 2)
    seen = []

    def killed():
        seen.append("killed")
        raise KeyboardInterrupt

    options = {"validate_every": 4, "select": "r", "save_every": 100}
    with pytest.raises(KeyboardInterrupt):
        train(make(tmp_path, validate=killed, **options))
    training = make(tmp_path, validate=lambda: {"r": 2.0}, **options)
    assert training.resume() == 4 and training.unvalidated
    training.offer(4, {"r": 7.0})  # killed after this: last.pt does not know of it
    training = make(tmp_path, validate=lambda: {"r": 2.0}, **options)
    assert training.resume() == 4
    fit(training, batches(4), 4)
    assert training.best == {"step": 4, "value": 7.0}
    whole = train(make(tmp_path / "whole", validate=lambda: {"r": 2.0}, **options))
    torch.testing.assert_close(training.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
