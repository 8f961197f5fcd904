from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_graft.errors import StorageError
from megatron_graft.files import (
    alone_in,
    beside,
    canonical_json,
    directory_in_one_step,
    scratch_beside,
    sha256_of_file,
    storage_errors,
    take_lock,
    write_bytes_atomically,
    write_json_atomically,
)
from megatron_graft.log import get_logger


def test_sha256_of_file_is_that_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 40_000  # more than one read
    (tmp_path / "file").write_bytes(data)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1}) == b'{"a":[1,2],"b":1}'
    assert canonical_json({"a": 1}) != canonical_json({"a": 2})
    assert canonical_json("é") == '"é"'.encode()


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json_atomically(path, {"a": 1})
    write_json_atomically(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert os.listdir(path.parent) == ["file.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes_atomically(path, b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "a" / "target"
    with directory_in_one_step(target) as scratch:
        (scratch / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert os.listdir(target.parent) == ["target"]


def test_a_directory_whose_block_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), directory_in_one_step(tmp_path / "target") as scratch:
        (scratch / "file").write_text("x")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_another_has_in_hand_is_not(tmp_path):
    target, prefix = tmp_path / "tar*get", ".tar*get.partial-"
    names = [f"{prefix}left", f"{prefix}held", ".tar*get.backup", ".target.partial-other"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / f"{prefix}file").write_text("x")
    held = os.open(tmp_path / names[1], os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with directory_in_one_step(target) as scratch:
            assert scratch.name.startswith(prefix)
            with pytest.raises(ZeroDivisionError), directory_in_one_step(target):  # two at the same time
                assert scratch.is_dir()
                raise ZeroDivisionError
    finally:
        os.close(held)
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], f"{prefix}file", "tar*get"])


def test_a_scratch_that_another_took_for_abandoned_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    """Between its making and its opening nothing says that somebody has it."""
    opened, lost = os.open, []

    def open_late(path, *arguments):
        if not lost and f"{tmp_path / '.target.partial-'}" in str(path):
            lost.append(path)
            Path(path).rmdir()
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    with scratch_beside(tmp_path / "target") as scratch:
        assert scratch.is_dir() and lost and scratch != lost[0]


def test_what_lies_beside_a_directory_has_its_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bank" / "rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "bank")
    assert beside(Path("."), ".log") == tmp_path / "bank.log"
    assert beside(Path("rows/.."), ".log") == tmp_path / "bank.log"
    assert beside(Path("rows"), ".log") == Path("rows.log")


def test_a_directory_is_never_replaced(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("x")
    made = pytest.raises(StorageError, match="target: was made by another process meanwhile")
    with made, directory_in_one_step(tmp_path / "target") as scratch:
        (scratch / "file").write_text("y")
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(tmp_path / "target") == ["mine"]


def test_who_wants_to_be_alone_in_a_directory_waits(tmp_path: Path) -> None:
    entered: list[str] = []

    def second() -> None:
        with alone_in(tmp_path / "made" / "for it"):
            entered.append("second")

    thread = threading.Thread(target=second)
    with alone_in(tmp_path / "made" / "for it"):
        thread.start()
        thread.join(0.2)
        entered.append("first")
    thread.join(10)
    assert entered == ["first", "second"]


def test_a_file_system_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(get_logger(), "propagate", True)
    with alone_in(tmp_path / "work"):
        pass
    assert f"{tmp_path / 'work'}: cannot be locked (Function not implemented)" in caplog.text


def test_a_lock_that_another_has_is_not_taken(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as mine, (tmp_path / "lock").open("w") as theirs:
        assert take_lock(mine.fileno(), tmp_path) and not take_lock(theirs.fileno(), tmp_path)


@pytest.mark.parametrize("write", [write_json_atomically, lambda path, _: scratch_beside(path).__enter__()])
def test_nothing_is_written_below_a_file(tmp_path: Path, write: Callable[[Path, int], object]) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "inside", tmp_path / "file" / "deep" / "inside"):
        with pytest.raises(StorageError, match="is not a directory"):
            write(path, 1)


def test_nobody_is_alone_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is not a directory"), alone_in(tmp_path / "file" / "work"):
        pytest.fail("it was entered")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_refused_write_names_the_path_and_the_free_space(tmp_path, code):
    path = tmp_path / "not" / "there" / "yet"
    with pytest.raises(StorageError, match="bytes free") as caught, storage_errors(path):
        raise OSError(code, os.strerror(code))
    assert caught.value.subject == str(path)
    assert os.strerror(code) in str(caught.value)


def test_other_errors_are_not_disguised_as_storage(tmp_path):
    with pytest.raises(IsADirectoryError), storage_errors(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "is a directory")
