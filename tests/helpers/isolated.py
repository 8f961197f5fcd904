"""Run a function in a fresh process: the CPU shim must come before megatron, which other tests have imported."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_SECONDS = 180


def run_isolated(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module-level function in a spawned process and return what it returns (anything that pickles).

    Raises:
        AssertionError: the function raised (its traceback is the message), died or took too long.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_SECONDS):
            raise AssertionError(f"{function.__name__} took more than {TIMEOUT_SECONDS} s")
        succeeded, result = pickle.loads(receiver.recv_bytes())
    except EOFError as error:
        raise AssertionError(f"{function.__name__} died without a word") from error
    finally:
        process.kill()
        process.join()
    assert succeeded, result
    return result


def _call(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(answer))  # by value: torch would share memory that dies with this process
