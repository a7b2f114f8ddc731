"""One writer a folder: the kernel's lock on one machine, the token in the manifest between two."""

import contextlib
import errno
import json
import os
import signal

import filelock
import pytest

from newllm.errors import UserError
from newllm.saving.guard import Guard, LockLost, holder, read_manifest

ELSEWHERE = "process 7 on elsewhere (t)"


@pytest.fixture
def take(tmp_path):
    """Function that gives a Guard of tmp_path, let go of at the end."""
    with contextlib.ExitStack() as stack:

        def begin():
            guard = Guard(tmp_path)
            stack.callback(guard.release)
            return guard

        yield begin


def test_the_writer_is_named_while_it_writes_and_the_rest_of_the_manifest_stays(tmp_path, take):
    """A second one is refused with a sentence, and changes nothing; behind the first no lock stays."""
    (tmp_path / "manifest.json").write_text('{"run_id": "r", "writer": "process 1 on old"}')
    guard = take()
    assert read_manifest(tmp_path) == {"run_id": "r", "writer": guard.token}
    with pytest.raises(
        UserError, match=rf"process {os.getpid()} on .* is using {tmp_path}: stop that"
    ) as end:
        take()
    assert holder(tmp_path) == str(end.value)
    guard.check()
    guard.release()
    assert os.listdir(tmp_path) == ["manifest.json"] and holder(tmp_path) is None
    assert os.listdir(tmp_path) == ["manifest.json"]  # asking makes nothing
    assert take().token != guard.token


def test_a_killed_holder_leaves_nothing_behind_that_counts(tmp_path, take):
    """kill -9: the next one takes the folder at once, without a word and without a clock."""
    child = os.fork()
    if not child:
        Guard(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run.lock").exists() and holder(tmp_path) is None
    take().check()


def test_a_run_that_was_taken_over_stops_with_a_sentence_and_overwrites_nothing(tmp_path, take):
    """By who started later on another machine; also if that one has ended when this one looks again."""
    guard = take()
    (tmp_path / "manifest.json").write_text(json.dumps({"writer": ELSEWHERE}))
    for _ in range(2):
        with pytest.raises(LockLost) as caught:
            guard.check()
        assert str(caught.value).startswith(f"{ELSEWHERE} has taken over {tmp_path} from this run, which")
        assert read_manifest(tmp_path) in ({"writer": ELSEWHERE}, {})
        (tmp_path / "manifest.json").unlink(missing_ok=True)
    assert guard.lost == ELSEWHERE


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_a_manifest_that_names_nobody_is_no_sign_of_another(tmp_path, take, content):
    """Deleted or garbled by a network folder; the next save makes it anew."""
    guard = take()
    (tmp_path / "manifest.json").unlink()
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    guard.check()


def test_where_the_file_system_knows_no_locks_the_token_alone_guards(tmp_path, take, monkeypatch):
    """As on some mounted Drives: the later of two goes on."""

    def refuse(lock):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    one, two = take(), take()
    assert holder(tmp_path) is None
    two.check()
    with pytest.raises(LockLost):
        one.check()


def test_a_folder_that_cannot_be_used_is_a_sentence(tmp_path, take, monkeypatch):
    """A read-only disk; an unreadable manifest later is an error of the disk and no loss."""

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match=r"cannot lock .*Read-only"):
            take()
    guard = take()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(IsADirectoryError):
        guard.check()
    assert not guard.lost
