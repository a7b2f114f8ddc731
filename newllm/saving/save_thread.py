"""The thread that writes checkpoints while training goes on: one at a time, and what the disk refuses is no end of a run."""

import time
from concurrent.futures import ThreadPoolExecutor


class SaveThread:
    """Runs write jobs in the background.

    Args:
        check: called before a job writes; raises if nothing may be written any more.
        say: prints a line.

    Attributes:
        failure: why the last job was refused by the disk, None when it was not.
        waited: seconds for which the caller stood still; written: seconds for which a job was at work.
        saves: jobs that wrote all they had; longest: seconds of the longest job.
    """

    def __init__(self, check, say):
        self.check, self.say = check, say
        self.failure, self.waited, self.written = None, 0.0, 0.0
        self.saves, self.longest = 0, 0.0
        self._pool, self._under_way = ThreadPoolExecutor(1, "checkpoint"), None

    @property
    def busy(self):
        return self._under_way is not None and not self._under_way.done()

    def start(self, prepare, write):
        """Wait for the job before, then `write(prepare())`: preparing here and now, writing in the thread."""
        self.wait()
        started = time.monotonic()
        prepared = prepare()
        self._under_way = self._pool.submit(self._run, write, prepared)
        self.waited += time.monotonic() - started

    def wait(self):
        """Until the job under way is done. Raises what it raised, other than the disk's refusal."""
        started = time.monotonic()
        if self._under_way:
            under_way, self._under_way = self._under_way, None
            under_way.result()
        self.waited += time.monotonic() - started

    def close(self):
        self._pool.shutdown()

    def _run(self, write, prepared):
        started = time.monotonic()
        try:
            self.check()
            write(prepared)
            self.failure, self.saves = None, self.saves + 1
        except OSError as error:
            self.failure = error.strerror or str(error)
            self.say(
                f"warning: checkpoint not saved ({self.failure}); training goes on, the files from before are whole"
            )
        finally:
            seconds = time.monotonic() - started
            self.written, self.longest = self.written + seconds, max(self.longest, seconds)
