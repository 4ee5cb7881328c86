"""Which errors are the user's (one line, exit code 2) and which are bugs (a traceback), and what is logged."""

import errno
import logging
import os
import re
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch._utils import ExceptionWrapper
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from configs.loading import load_config
from datasets.sampler import ResumableSampler
from engine import stopping
from engine.launch import launch, run
from engine.options.command_line import Parser, add_device_options, positive_float, positive_int, share
from sparsity.allocation.budget import parse_sparsities
from sparsity.errors import UserError
from tests.processes import error_line


class Broken(Dataset):
    """Raises in the workers of a DataLoader."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return parse_sparsities("7,abc")


def read_broken():
    list(DataLoader(Broken(), num_workers=1))


def bug_in_worker():
    """As a DataLoader raises again what its worker caught."""
    try:
        int("x")
    except ValueError:
        ExceptionWrapper(where="in DataLoader worker process 0").reraise()


@pytest.fixture
def ended(capfd):
    """Runs a script's main; its exit code and what is on stderr."""

    def ended(main):
        with pytest.raises(SystemExit) as caught:
            run(main)
        return caught.value.code, capfd.readouterr().err

    return ended


def os_error():
    Path("/nowhere/at/all").read_text()


@pytest.mark.parametrize(
    ("main", "told"),
    [
        (lambda: load_config("nothing.yaml", ResumableSampler), "nothing.yaml: configuration file not found"),
        (lambda: parse_sparsities("abc"), "got 'abc'"),
        (lambda: ResumableSampler(0, seed=0, batch_size=1), "size and batch_size must be at least 1"),
        (read_broken, "got 'abc' in '7,abc'"),
    ],
)
def test_the_users_errors_are_one_line(ended, main, told):
    code, text = ended(main)
    assert code == 2
    assert told in error_line(text)


def unpack():
    (_,) = ResumableSampler(2, seed=0, batch_size=1, stop=3)


@pytest.mark.parametrize(
    "main",
    [
        lambda: torch.nn.functional.cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
        lambda: torch.optim.AdamW([], lr=1),
        lambda: list(zip([1], [], strict=True)),
        lambda: ResumableSampler(),
        lambda: int("x"),
        os_error,
        unpack,
        bug_in_worker,
    ],
)
def test_bugs_keep_their_traceback(main):
    with pytest.raises((ValueError, TypeError, RuntimeError, OSError)):
        run(main)


def test_an_assertion_is_a_bug():
    def wrong():
        raise AssertionError("cannot happen")

    with pytest.raises(AssertionError):
        run(wrong)


@pytest.mark.script
def test_an_interrupt_says_so(ended):
    def interrupted():
        raise KeyboardInterrupt

    code, text = ended(interrupted)
    assert code == 130 and "\ninterrupted\n" in text and "Traceback" not in text


def test_other_ranks_say_which_they_are_and_are_quiet(ended, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main():
        logging.getLogger("configs.loading").info("twice")
        parse_sparsities("abc")

    text = ended(main)[1]
    assert error_line(text).startswith("error (rank 1): sparsities are") and "twice" not in text


@pytest.fixture
def parser():
    parser = Parser("what it does\n\n    example")
    parser.add_argument("-s", "--sparsities", help="default: 63")
    parser.add_argument("--num_batches", type=positive_int, default=3, help="default: %(default)s")
    parser.add_argument("--lambda_", type=positive_float, default=1e-5, help="default: %(default)s")
    parser.add_argument("--max_skipped", type=share, help="default: the configuration's")
    add_device_options(parser)
    return parser


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--num_batches", "0"], "--num_batches: expected an integer of at least 1, got '0'"),
        (["--num_batches", "1.5"], "--num_batches: expected an integer of at least 1, got '1.5'"),
        (["--lambda_", "nan"], "--lambda_: expected a number above 0, got 'nan'"),
        (["--lambda_", "inf"], "--lambda_: expected a number above 0"),
        (["--lambda_", "0"], "--lambda_: expected a number above 0"),
        (["--lambda_", "-1"], "--lambda_: expected a number above 0"),
        (["--max_skipped", "2"], "--max_skipped: expected a fraction between 0 and 1"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 2^32 - 1, got '-1'"),
        (["--seed", "4294967296"], "--seed"),
        (["--devices", "0"], "--devices"),
        (["--precision", "64"], "--precision: invalid choice: '64'"),
        (["--strategy", "fsdp"], "--strategy: invalid choice"),
        (["--accelerator", "gpus"], "--accelerator: invalid choice"),
        (["--sparsity", "50"], "unrecognized argument --sparsity, did you mean --sparsities?"),
        (["--num_batch=50"], "unrecognized argument --num_batch, did you mean --num_batches?"),
        (["50"], "unrecognized argument 50"),
        (["-s"], "-s/--sparsities: expected one argument"),
    ],
)
def test_arguments_that_cannot_be(parser, capsys, arguments, told):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(arguments)
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.count("\n") == 1 and told in text


def test_arguments_that_can(parser):
    args = parser.parse_args(["-s", "-5", "--lambda_", "1e-3", "--max_skipped", "0", "-d", "2"])
    assert (args.sparsities, args.lambda_, args.max_skipped, args.devices, args.seed) == ("-5", 1e-3, 0.0, 2, 42)


def test_help_shows_the_example_and_every_default(parser):
    text = parser.format_help()
    assert "what it does\n\n    example" in text
    options = re.split(r"\n  -", text)[1:]
    assert all("default" in option for option in options if "--help" not in option)


def test_a_device_that_is_not_there_is_named(parser):
    for accelerator, backend in (("gpu", torch.accelerator), ("mps", torch.backends.mps)):
        if not backend.is_available():
            with pytest.raises(ValueError, match=f"--accelerator {accelerator} --devices 1"):
                launch(parser.parse_args(["--accelerator", accelerator]))


def test_launch_seeds(parser):
    drawn = []
    for seed in ("7", "7", "8"):
        launch(parser.parse_args(["--accelerator", "cpu", "--seed", seed]))
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("sync", [True, False])
def test_buffers_are_sent_to_the_ranks_only_where_they_may_differ(tmp_path, monkeypatch, sync):
    class RecordedError(Exception):
        pass

    def record(strategy, **_):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replica = DistributedDataParallel(torch.nn.Linear(1, 1), **strategy._ddp_kwargs)
        raise RecordedError(replica.broadcast_buffers)

    monkeypatch.setattr("lightning.fabric.Fabric", record)
    parser = Parser("x")
    add_device_options(parser)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=f": {sync}$"):
            launch(parser.parse_args(["--devices", "2", "--accelerator", "cpu"]), sync_buffers=sync)
    finally:
        distributed.destroy_process_group()


def test_mps_is_refused_or_left_alone(parser, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for accelerator in ("mps", "gpu"):
        with pytest.raises(UserError, match=f"--accelerator {accelerator}: MPS has no float64.* --accelerator cpu"):
            launch(parser.parse_args(["--accelerator", accelerator]))
    assert launch(parser.parse_args([])).device.type == "cpu"


def test_arithmetic_is_set_at_launch(parser):
    cpu = ["--accelerator", "cpu"]
    try:
        for flags, tf32, deterministic in ((["--tf32", "--deterministic"], True, True), ([], False, False)):
            launch(parser.parse_args([*cpu, *flags]))
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
            assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def resource_errors():
    yield OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left"
    yield MemoryError(), "not enough memory"
    yield RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"), "not enough memory"
    yield torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "try smaller batches"
    yield RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "process that reads data was killed"


@pytest.mark.parametrize(("error", "told"), [*resource_errors()])
def test_what_is_used_up_is_one_line_and_code_4(ended, error, told):
    def main():
        raise error

    code, text = ended(main)
    assert code == 4 and re.fullmatch(r"error: [^\n]+\n", text) and told in text


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_stop(ended, kind):
    seen = []

    def at_once():
        os.kill(os.getpid(), kind)
        seen.append("not here")

    assert ended(at_once) == (3, f"stopped by {kind.name}: the same command goes on\n")

    def in_a_step():
        with stopping.deferred():
            os.kill(os.getpid(), kind)
            seen.append(stopping.asked())
            with stopping.at_once():
                seen.append("nor here")

    assert ended(in_a_step)[0] == 3 and seen == [kind.name]

    def at_the_end():
        with stopping.deferred():
            os.kill(os.getpid(), kind)

    assert ended(at_the_end)[0] == 3
