"""The target holds the latest state and the one before, and a whole one at every instant."""

import errno
import os

import pytest
from mirror_fakes import content, do_round, fails, save, slots

from newllm.saving.backup import Mirror


def test_the_target_holds_the_latest_state_and_the_one_before(folders, mirror, target):
    """Each new copy moves the old one to the second slot; an unchanged one moves nothing."""
    source, copy = folders
    for number, expected in (
        (1, {"latest": 1}),
        (2, {"latest": 2, "prev": 1}),
        (3, {"latest": 3, "prev": 2}),
    ):
        save(source, number)
        for _ in range(2):
            do_round(mirror, ["model_latest.pt", "manifest.json"])
            assert slots(copy) == expected
    assert content(copy) == ["manifest.json", "model_latest.pt", "model_prev.pt"]
    assert target.renames()[-2:] == ["model_prev.pt", "model_latest.pt"]


def test_a_kill_at_any_instant_leaves_a_whole_state(folders, clock, target, monkeypatch):
    """From one operation on nothing works, not even tidying up: the old or the new state is there; the next run mends."""
    source, copy = folders
    between, left, number = 0, 0, 1

    def kill(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, "killed")

    save(source, number)
    for operations in range(100):
        mirror = Mirror(*folders, "mine", attempts=1, clock=clock, sleep=clock.sleep)
        do_round(mirror, ["model_latest.pt"])
        assert slots(copy)["latest"] == number  # whatever the one before left behind
        number, left, target.before = number + 1, operations, kill
        save(source, number)
        with monkeypatch.context() as patch:
            patch.setattr(os, "truncate", kill)
            do_round(mirror, ["model_latest.pt"])
        mirror.close(flush=False)
        target.before = lambda *_: None
        found = slots(copy)
        assert {number - 1, number} & set(found.values()), f"nothing whole after {operations} operations"
        between += found == {"prev": number - 1} and not (copy / "model_latest.pt").exists()
        if left >= 0:
            break
    assert operations == 7  # read the old one, open, write, read back, rename, rename, read back
    assert between == 1  # the kill between the renames
    assert found == {"latest": number, "prev": number - 1}
    assert content(copy) == ["model_latest.pt", "model_prev.pt"]


@pytest.mark.parametrize("arrives", [0, 100])
def test_a_torn_latest_never_takes_the_place_of_the_whole_one_before(folders, clock, target, arrives):
    """Neither in the further attempts, nor in the next round, nor in the next session; then it is mended."""
    source, copy = folders
    for session in range(2):
        mirror = Mirror(*folders, "mine", clock=clock, sleep=clock.sleep)
        if session == 0:
            for number in (1, 2):
                save(source, number)
                do_round(mirror, ["model_latest.pt"])
            target.copying_rename = arrives
            save(source, 3)
        for _ in range(2):
            do_round(mirror, ["model_latest.pt"])
            assert "reads back differently" in mirror.report()
            assert slots(copy) == {"prev": 2}
            assert (copy / "model_latest.pt").stat().st_size == arrives
        mirror.close(flush=False)
    target.copying_rename = None
    mirror = Mirror(*folders, "mine", clock=clock, sleep=clock.sleep)
    do_round(mirror, ["model_latest.pt"])
    mirror.close()
    assert slots(copy) == {"latest": 3, "prev": 2}


def test_a_copy_that_the_target_damages_later_is_made_again(folders, mirror):
    """Drive loses the tail of what it had: noticed, and the state before stays in its slot."""
    source, copy = folders
    for number in (1, 2):
        save(source, number)
        do_round(mirror)
    os.truncate(copy / "model_latest.pt", 100)
    do_round(mirror)
    assert slots(copy) == {"latest": 2, "prev": 1}


def test_an_old_copy_that_cannot_be_read_is_not_replaced(folders, mirror, target):
    """Perhaps it is the only whole one: an error of the target, tried again."""
    source, copy = folders
    save(source, 1)
    do_round(mirror, ["model_latest.pt"])
    save(source, 2)
    fault = fails(errno.EIO, operation="open rb")
    target.before = lambda operation, path: (
        fault(operation, path) if path == copy / "model_latest.pt" else None
    )
    do_round(mirror, ["model_latest.pt"])
    assert "FAILED: [Errno 5]" in mirror.report()
    target.before = lambda *_: None
    assert slots(copy) == {"latest": 1}
    do_round(mirror, [])
    assert slots(copy) == {"latest": 2, "prev": 1}
