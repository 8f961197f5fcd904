"""The fuzzers' driver for machines without clang: it ends, and keeps the input, whatever an input does."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = """
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t) {
    switch (data[0]) {
        case 't':
            for (volatile bool endless = true; endless;) {
            }
            break;
        case 'm': {
            constexpr std::size_t kBytes = std::size_t{300} << 20U;
            void* const memory = std::malloc(kBytes);
            std::memset(memory, data[1], kBytes);
            static void* volatile kept;
            kept = memory;
            std::free(kept);
            break;
        }
        case 'x':
            throw std::runtime_error("out of the target");
        default:
            break;
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("driver")
    (directory / "target.cpp").write_text(TARGET)
    compiler = os.environ.get("CXX", "c++").split()
    sources = [directory / "target.cpp", REPOSITORY / "csrc" / "fuzz" / "standalone.cpp"]
    command = [*compiler, "-std=c++20", "-I", REPOSITORY / "csrc", *sources, "-o", directory / "driver"]
    subprocess.run(command, check=True, timeout=300)
    return directory / "driver"


def run(program: Path, tmp_path: Path, *inputs: bytes) -> tuple[int, str, Path]:
    """Exit code, what it said, and where it keeps a finding; every input lies in a directory of its own."""
    for number, content in enumerate(inputs):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "input").write_bytes(content)
    failure = tmp_path / "failure"
    limits = ["--timeout", "1", "--rss-limit-mb", "200", "--failure", failure]
    command = [program, *limits, *(tmp_path / str(number) for number in range(len(inputs)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, failure


def test_harmless_inputs_are_replayed_from_all_directories(program: Path, tmp_path: Path) -> None:
    code, said, failure = run(program, tmp_path, b"ab", b"cd", b"ef")
    assert (code, failure.exists()) == (0, False)
    assert "3 kept inputs replayed" in said


@pytest.mark.parametrize(
    ("finding", "problem"),
    [
        (b"t1", "takes longer than the timeout"),
        (b"m1", "an input brings the process to 3.. MiB"),
        (b"x1", "an unexpected error: out of the target"),
    ],
)
def test_what_an_input_must_not_do_ends_the_run_and_keeps_it(
    program: Path, tmp_path: Path, finding: bytes, problem: str
) -> None:
    code, said, failure = run(program, tmp_path, b"ab", finding)
    assert code != 0
    assert failure.read_bytes() == finding
    assert re.search(problem, said)
    assert "the input was kept as" in said
