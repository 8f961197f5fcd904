from __future__ import annotations

import inspect
import pickle

import pytest

from megatron_graft import errors
from megatron_graft.bank.arrays import ArrayError
from megatron_graft.commands import EXIT_BAD_INPUT, run_command
from megatron_graft.errors import BankError, BankFormatError, ConfigError, GraftError

ALL_ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, GraftError)] + [
    ArrayError
]


def test_message_says_where_what_got_expected_and_the_way_out():
    error = ConfigError("--graft-layers", "names no layer", got=40, expected="1 to 12", remedy="Give another.")
    assert str(error) == "--graft-layers: names no layer (got 40; expected 1 to 12). Give another."


def test_message_leaves_out_what_is_not_known():
    assert str(BankError("dir", "is empty")) == "dir: is empty"
    assert str(BankError("dir", "is empty", got=0)) == "dir: is empty (got 0)"


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind):
    error = kind("file", "is bad", got=1, expected=2, remedy="Mend it.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.subject, copy.problem, copy.got, copy.expected) == ("file", "is bad", 1, 2)


def test_all_bank_errors_can_be_caught_as_one():
    assert issubclass(BankFormatError, BankError) and issubclass(BankError, GraftError)


def test_a_command_turns_a_typed_error_into_one_line_and_an_exit_code(capsys):
    def body() -> None:
        raise BankError("dir", "is empty")

    assert run_command(body) == EXIT_BAD_INPUT
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: dir: is empty\n")


def test_a_command_lets_other_errors_through():
    def body() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(body)
    assert run_command(lambda: None) == 0
