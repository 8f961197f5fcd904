"""The C++ programs beside the extension: their test runner fails when it must, and all of them are in CI."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "csrc" / "tests"
SAMPLE = """
#include "check.hpp"

TEST("sums are right") { CHECK_EQUAL(1 + 1, 2); }
TEST("a wrong sum fails") { CHECK_EQUAL(1 + 1, 3); }
TEST("a false condition fails") { CHECK(1 > 2); }
TEST("a false condition of one of many fails") { CHECK_FOR(1 > 2, std::string("this one")); }
TEST("nothing thrown fails") { CHECK_THROWS(std::runtime_error, 1 + 1, ""); }
TEST("another type thrown fails") { CHECK_THROWS(std::logic_error, throw std::runtime_error("x"), ""); }
TEST("another message thrown fails") { CHECK_THROWS(std::runtime_error, throw std::runtime_error("x"), "y"); }
TEST("an error that leaves a test fails") { throw std::runtime_error("out of here"); }
TEST("the right error is right") { CHECK_THROWS(std::runtime_error, throw std::runtime_error("x"), "x"); }
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner with sample tests, of which two pass."""
    directory = tmp_path_factory.mktemp("runner")
    (directory / "sample.cpp").write_text(SAMPLE)
    program = directory / "run_tests"
    compiler = os.environ.get("CXX", "c++").split()
    sources = [directory / "sample.cpp", TESTS / "check_main.cpp"]
    subprocess.run([*compiler, "-std=c++20", "-I", TESTS, *sources, "-o", program], check=True, timeout=300)
    return program


def run(program: Path, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *names], capture_output=True, text=True, timeout=60)


def closing_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_every_kind_of_failure_is_counted_and_shown_with_its_place(runner: Path) -> None:
    done = run(runner)
    assert done.returncode == 1
    assert closing_line(done.stdout) == "2 passed, 7 failed"
    assert len(re.findall(r"sample\.cpp:\d+: ", done.stdout)) == 6  # all but the error that left its test
    assert "1 + 1 is 2, expected 3" in done.stdout
    assert "this one" in done.stdout
    assert "out of here" in done.stdout


def test_chosen_tests_run_alone(runner: Path) -> None:
    done = run(runner, "sums are", "the right error")
    assert done.returncode == 0
    assert closing_line(done.stdout) == "2 passed, 0 failed"


def test_a_run_of_no_tests_fails(runner: Path) -> None:
    done = run(runner, "no such test")
    assert done.returncode == 1
    assert closing_line(done.stdout) == "0 passed, 0 failed"


def test_continuous_integration_runs_the_programs_before_the_tests() -> None:
    stages = (REPOSITORY / ".ci" / "run").read_text()
    order = [
        "make --keep-going check",
        "test-native",
        "test-asan",
        "test-tsan",
        "prove-lookup",
        "fuzz ",
        "make test ||",
    ]
    places = [stages.index(stage) for stage in order]
    assert places == sorted(places)
