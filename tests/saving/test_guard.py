"""One writer a folder: the kernel's lock on one machine, the token in the manifest between two."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal

import filelock
import pytest

from newllm.errors import UserError
from newllm.saving.guard import Guard, LockLost, holder, read_manifest

ELSEWHERE = "process 7 on elsewhere (t)"


def hold(folder, pipe):
    """When told, take the folder and say so or why not; when told again, look whether it is still ours."""
    pipe.recv()
    try:
        guard = Guard(folder)
        pipe.send("held")
        pipe.recv()
        guard.check()
        pipe.send("still held")
        guard.release()
    except UserError as error:
        pipe.send(str(error))


@pytest.fixture
def start(tmp_path):
    """Function that gives a process which will `hold` tmp_path, and the pipe to it."""
    with contextlib.ExitStack() as stack:

        def begin():
            pipe, other = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, other))
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
            return process, pipe

        yield begin


@pytest.fixture
def first(start):
    process, pipe = start()
    pipe.send("take it")
    assert pipe.recv() == "held"
    return process, pipe


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
    """No lock file stays, and the folder can be taken again."""
    (tmp_path / "manifest.json").write_text('{"run_id": "r", "writer": "process 1 on old"}')
    guard = take()
    assert read_manifest(tmp_path) == {"run_id": "r", "writer": guard.token}
    assert str(os.getpid()) in guard.token
    guard.check()
    guard.release()
    assert os.listdir(tmp_path) == ["manifest.json"] and holder(tmp_path) is None
    assert take().token != guard.token


def test_the_second_of_two_processes_is_refused(tmp_path, first):
    """Even if the first was stopped by Ctrl-Z; a sentence names it; it goes on; asking makes nothing."""
    process, pipe = first
    os.kill(process.pid, signal.SIGSTOP)
    before = read_manifest(tmp_path)
    with pytest.raises(UserError, match=rf"process {process.pid} on .* is using {tmp_path}: stop that"):
        Guard(tmp_path)
    assert holder(tmp_path).startswith(f"process {process.pid} on ")
    assert read_manifest(tmp_path) == before
    os.kill(process.pid, signal.SIGCONT)
    pipe.send("check")
    assert pipe.recv() == "still held"
    process.join()
    assert holder(tmp_path) is None and os.listdir(tmp_path) == ["manifest.json"]


def test_a_killed_holder_leaves_nothing_behind_that_counts(tmp_path, first, take):
    """kill -9: the next one takes the folder at once, without a word and without a clock."""
    first[0].kill()
    first[0].join()
    assert holder(tmp_path) is None
    take().check()


def test_of_many_takers_exactly_one_wins(start):
    """Five processes at the same instant."""
    pipes = [start()[1] for _ in range(5)]
    for pipe in pipes:
        pipe.send("take it")
    said = [pipe.recv() for pipe in pipes]
    assert said.count("held") == 1 and all("is using" in text for text in said if text != "held"), said


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
            Guard(tmp_path)
    guard = take()
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(IsADirectoryError):
        guard.check()
    assert not guard.lost
