"""One copy of a bank on a node, whatever the processes that want it do: start at once, die in the middle, run full."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from megatron_graft.bank import node_copy as module
from megatron_graft.bank.manifest import KEYS_NAME, MANIFEST_NAME
from megatron_graft.bank.node_copy import node_copy
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.errors import BankError, BankFormatError, BankIncompleteError, IdentityError, StorageError
from megatron_graft.log import Progress
from tests.helpers.banks import make_bank
from tools import stage_bank

SPAWN = multiprocessing.get_context("spawn")
PROCESSES = 4
PATIENCE_SECONDS = 120


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank", {(1, 2): 9, (7, 1, 2): 5, (4, 4): 1}, layers=(3, 7))


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "node" / "banks"


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def names(bank: Bank) -> list[str]:
    """What a directory with nothing but one complete copy in it holds."""
    return sorted([bank.digest, f"{bank.digest}.lock"])


def test_the_copy_is_the_bank_byte_for_byte_and_opens_as_it(bank: Bank, local: Path) -> None:
    copy = node_copy(bank.path, local)
    assert copy == local / bank.digest
    assert contents(copy) == contents(bank.path)
    assert open_bank(copy, verify="full").digest == bank.digest
    assert sorted(os.listdir(local)) == names(bank)


def test_a_complete_copy_is_used_again(bank: Bank, local: Path) -> None:
    first = {file.name: file.stat().st_ino for file in node_copy(bank.path, local).iterdir()}
    assert {file.name: file.stat().st_ino for file in node_copy(bank.path, local).iterdir()} == first


def test_a_copy_that_fails_the_header_check_is_made_again(bank: Bank, local: Path) -> None:
    copy = node_copy(bank.path, local)
    os.truncate(copy / KEYS_NAME, 100)
    assert contents(node_copy(bank.path, local)) == contents(bank.path)
    (copy / MANIFEST_NAME).unlink()
    assert contents(node_copy(bank.path, local)) == contents(bank.path)
    assert sorted(os.listdir(local)) == names(bank)


def flip_last_byte(path: Path) -> None:
    """Damage that no header tells of."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_copy_with_an_altered_byte_is_found_and_made_again_by_a_full_check(bank: Bank, local: Path) -> None:
    copy = node_copy(bank.path, local)
    flip_last_byte(copy / KEYS_NAME)
    node_copy(bank.path, local, verify="header")
    assert contents(copy) != contents(bank.path), "the header does not show it"
    assert node_copy(bank.path, local, verify="full") == copy
    assert contents(copy) == contents(bank.path)
    assert sorted(os.listdir(local)) == names(bank)


def test_a_storage_that_alters_bytes_is_found_by_a_full_check_and_leaves_no_copy(
    bank: Bank, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_file = module._copy_file

    def alter(source: Path, target: Path, progress: Progress) -> int:
        copied = copy_file(source, target, progress)
        if target.name == KEYS_NAME:
            flip_last_byte(target)
        return copied

    monkeypatch.setattr(module, "_copy_file", alter)
    with pytest.raises(BankFormatError, match=f"is no true copy of {bank.path}: .*{KEYS_NAME}: was altered"):
        node_copy(bank.path, local, verify="full")
    assert os.listdir(local) == [f"{bank.digest}.lock"]


def test_the_command_prints_where_the_copy_is(
    bank: Bank, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for depth in ("header", "sample", "full"):
        assert stage_bank.main([str(bank.path), str(local), "--verify", depth]) == 0
        assert capsys.readouterr().out == f"{local / bank.digest}\n"
    flip_last_byte(bank.path / KEYS_NAME)
    assert stage_bank.main([str(bank.path), str(tmp_path / "other"), "--verify", "full"]) == 2
    assert "is no true copy" in capsys.readouterr().err


def test_copies_of_two_banks_lie_side_by_side(bank: Bank, local: Path, tmp_path: Path) -> None:
    other = make_bank(tmp_path / "other", {(3, 2): 4})
    for wanted in (bank, other):
        assert open_bank(node_copy(wanted.path, local)).digest == wanted.digest
    assert len(os.listdir(local)) == 4


# ---- several processes


def report_what_was_opened(bank: Path, local: Path, barrier: Barrier, answers: Queue[object]) -> None:
    """Child: copy at the same moment as the others; say whether this one did, and which inodes it has mapped."""
    copied = []
    original = module._copy
    module._copy = lambda *arguments: (copied.append(True), original(*arguments))  # type: ignore[assignment]
    barrier.wait(PATIENCE_SECONDS)
    opened = open_bank(node_copy(bank, local))
    opened.rows_of_keys()
    barrier.wait(PATIENCE_SECONDS)  # so that all have it mapped at once
    answers.put((len(copied), opened.digest, mapped_inodes(opened.path)))
    barrier.wait(PATIENCE_SECONDS)


def mapped_inodes(directory: Path) -> dict[str, int]:
    """File name -> inode of every file below ``directory`` that this process has mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    paths = {fields[5]: int(fields[4]) for fields in lines if len(fields) == 6}
    return {Path(path).name: inode for path, inode in paths.items() if Path(path).parent == directory.resolve()}


@contextlib.contextmanager
def processes(count: int, target: Callable[..., None], *arguments: object) -> Iterator[list[multiprocessing.Process]]:
    started = [SPAWN.Process(target=target, args=arguments) for _ in range(count)]
    for process in started:
        process.start()
    try:
        yield started  # type: ignore[misc]
    finally:
        for process in started:
            process.kill()
            process.join()


def test_of_many_processes_one_copies_and_all_map_the_same_files(bank: Bank, local: Path) -> None:
    answers: Queue[object] = SPAWN.Queue()
    with processes(PROCESSES, report_what_was_opened, bank.path, local, SPAWN.Barrier(PROCESSES), answers) as started:
        seen = [answers.get(timeout=PATIENCE_SECONDS) for _ in started]
    copied, digests, inodes = zip(*seen, strict=True)  # type: ignore[call-overload]
    assert sorted(copied) == [0] * (PROCESSES - 1) + [1]
    assert set(digests) == {bank.digest}
    # The files of keys and of both donor layers' rows, and nothing of the original.
    assert len(inodes[0]) == 3 and all(found == inodes[0] for found in inodes)
    assert inodes[0] == {name: (local / bank.digest / name).stat().st_ino for name in inodes[0]}
    assert sorted(os.listdir(local)) == names(bank)


# ---- killed in the middle


def copy_and_die(bank: Path, local: Path, blocks: int) -> None:
    """Child: SIGKILL itself after so many blocks; each file of the small bank is one."""
    advance = Progress.advance

    def count(progress: Progress, units: int) -> None:
        nonlocal blocks
        advance(progress, units)
        if progress.label.startswith("copy"):
            blocks -= 1
            if not blocks:
                os.kill(os.getpid(), signal.SIGKILL)

    Progress.advance = count  # type: ignore[method-assign]
    node_copy(bank, local)


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_a_process_killed_while_copying_leaves_nothing_that_opens_and_the_next_one_clears_up(
    bank: Bank, local: Path, blocks: int
) -> None:
    assert len(contents(bank.path)) == 5
    with processes(1, copy_and_die, bank.path, local, blocks) as (child,):
        child.join(PATIENCE_SECONDS)
        assert child.exitcode == -signal.SIGKILL
    left = set(os.listdir(local)) - {f"{bank.digest}.lock"}
    assert len(left) == 1 and all(name.startswith(f".{bank.digest}.") for name in left)
    assert contents(node_copy(bank.path, local)) == contents(bank.path)
    assert sorted(os.listdir(local)) == names(bank)


def copy_and_stop(bank: Path, local: Path, reached: Path) -> None:
    """Child: stop for good after the first file, lock in hand."""
    copy_file = module._copy_file

    def stop(*arguments: object) -> int:
        copied = copy_file(*arguments)  # type: ignore[arg-type]
        reached.touch()
        time.sleep(PATIENCE_SECONDS)
        return copied

    module._copy_file = stop
    node_copy(bank, local)


def only_copy(bank: Path, local: Path, answers: Queue[object], started: Path) -> None:
    started.touch()
    answers.put(node_copy(bank, local))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_who_waits_for_a_process_that_is_killed_copies_in_its_place(bank: Bank, local: Path, tmp_path: Path) -> None:
    answers: Queue[object] = SPAWN.Queue()
    with processes(1, copy_and_stop, bank.path, local, tmp_path / "reached") as (first,):
        wait_for(tmp_path / "reached")
        with processes(1, only_copy, bank.path, local, answers, tmp_path / "started"):
            wait_for(tmp_path / "started")
            time.sleep(0.5)  # long enough for a process that does not wait
            assert answers.empty() and not (local / bank.digest).exists()
            first.kill()
            assert answers.get(timeout=PATIENCE_SECONDS) == local / bank.digest
    assert contents(local / bank.digest) == contents(bank.path)
    assert sorted(os.listdir(local)) == names(bank)


def test_what_a_copying_process_has_written_can_be_told(bank: Bank, local: Path) -> None:
    scratch = local / f".{bank.digest}.abc"
    scratch.mkdir(parents=True)
    (scratch / "part").write_bytes(bytes(70))
    assert module._scratch_bytes(local / bank.digest) == 70
    assert module._scratch_bytes(local / "another") == 0


# ---- no room


def test_a_bank_that_does_not_fit_is_refused_before_a_byte_is_copied(
    bank: Bank, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(map(len, contents(bank.path).values()))
    usage = shutil.disk_usage(bank.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(
        StorageError, match=rf"has no room for .*got {size - 1:,} bytes free; expected at least {size:,}"
    ):
        node_copy(bank.path, local)
    assert os.listdir(local) == [f"{bank.digest}.lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    assert contents(node_copy(bank.path, local)) == contents(bank.path)


def copy_with_a_limit(bank: Path, local: Path, limit: int, answers: Queue[object]) -> None:
    """Child: writing a file beyond ``limit`` bytes fails, as on a file system that fills up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        answers.put(node_copy(bank, local))
    except StorageError as error:
        answers.put(str(error))


def test_a_storage_that_fills_up_on_the_way_leaves_nothing_behind(bank: Bank, local: Path) -> None:
    limit = max(map(len, contents(bank.path).values())) - 1
    answers: Queue[object] = SPAWN.Queue()
    with processes(1, copy_with_a_limit, bank.path, local, limit, answers):
        answer = answers.get(timeout=PATIENCE_SECONDS)
    assert str(answer).startswith(f"{local / bank.digest}: could not be written: File too large")
    assert os.listdir(local) == [f"{bank.digest}.lock"]


# ---- bad input


def test_a_bank_that_cannot_be_used_is_refused_by_its_own_name(bank: Bank, local: Path, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=f"^{tmp_path / 'nothing'}: "):
        node_copy(tmp_path / "nothing", local)
    os.truncate(bank.path / KEYS_NAME, 100)
    with pytest.raises(BankFormatError, match=f"^{bank.path / KEYS_NAME}: is truncated"):
        node_copy(bank.path, local)
    (bank.path / MANIFEST_NAME).unlink()
    with pytest.raises(BankIncompleteError, match=f"^{bank.path}: "):
        node_copy(bank.path, local)
    assert not local.exists()


def test_a_bank_that_is_replaced_while_it_is_copied_is_refused(
    bank: Bank, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_bank(tmp_path / "other", {(1, 2): 9, (7, 1, 2): 5, (5, 5): 1}, layers=(3, 7))
    sizes = [{name: len(data) for name, data in contents(path).items()} for path in (bank.path, other.path)]
    assert sizes[0] == sizes[1], "only the digest can tell"
    copy_file = module._copy_file

    def replace_first(source: Path, *arguments: object) -> int:
        shutil.copy(other.path / source.name, source)
        return copy_file(source, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_copy_file", replace_first)
    with pytest.raises(IdentityError, match=f"^{bank.path}: was replaced while it was copied .*expected {bank.digest}"):
        node_copy(bank.path, local)
    assert os.listdir(local) == [f"{bank.digest}.lock"]


def test_a_file_that_is_cut_short_while_it_is_copied_is_refused(
    bank: Bank, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_file = module._copy_file

    def cut_first(source: Path, *arguments: object) -> int:
        os.truncate(source, source.stat().st_size - (source.name == KEYS_NAME))
        return copy_file(source, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_copy_file", cut_first)
    with pytest.raises(BankFormatError, match=f"^{bank.path / KEYS_NAME}: changed while it was copied"):
        node_copy(bank.path, local)
    assert os.listdir(local) == [f"{bank.digest}.lock"]


def test_a_path_where_no_directory_can_be_is_refused(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=f"^{path}: is not a directory"):
            node_copy(bank.path, path)


def test_a_file_system_without_locks_is_refused(bank: Bank, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"\.lock: cannot be locked: Operation not supported"):
        node_copy(bank.path, local)
