"""The options of recovery, and what is refused of them."""

import argparse

import pytest

from engine.options.command_line import Parser, add_device_options
from engine.options.recovery import RecoveryOptions, add_recovery_options, recovery_options, usual_lr
from sparsity.errors import UserError


def parsed(*given: str) -> argparse.Namespace:
    parser = Parser("")
    add_recovery_options(parser)
    add_device_options(parser)
    return parser.parse_args(list(given))


def test_none_without_the_option():
    assert recovery_options(parsed()) is None


def test_what_is_given_and_what_is_usual():
    found = recovery_options(parsed("--recover", "50", "--recover_lr", "0.01", "--recover_warmup", "0"))
    assert found == RecoveryOptions(50, lr=0.01, warmup=0.0)


@pytest.mark.parametrize("given", [["--recover", "0"], ["--recover", "-3"], ["--recover", "5", "--recover_lr", "0"]])
def test_numbers_that_cannot_be(given, capsys):
    with pytest.raises(SystemExit):
        parsed(*given)
    assert "expected" in capsys.readouterr().err


def test_options_of_recovery_without_it():
    with pytest.raises(UserError, match="--recover_lr is for --recover STEPS"):
        recovery_options(parsed("--recover_lr", "0.1"))


def test_rounds_that_the_devices_cannot_share():
    with pytest.raises(UserError, match="--recover_rounds 3 cannot be shared by 2 devices"):
        recovery_options(parsed("--recover", "5", "--recover_rounds", "3", "--devices", "2"))


def test_wider_layers_have_lower_rates():
    assert usual_lr([64, 192, 768]) == usual_lr([8]) == 3e-4
    assert usual_lr([768, 768, 3072]) == pytest.approx(7.5e-5)
