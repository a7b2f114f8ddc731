"""Which errors of the hub are tried again, and how."""

import huggingface_hub
import pytest
from hub_fakes import ConnectError, HTTPError, ReadTimeout

from newllm.data import hub


def test_retry_backs_off_and_succeeds():
    """Two 429, then the value; the wait doubles."""
    errors, slept = [HTTPError(429), HTTPError(429)], []

    def function():
        if errors:
            raise errors.pop()
        return "value"

    assert hub.retry(function, sleep=slept.append) == "value" and slept == [1.0, 2.0]


@pytest.mark.parametrize(
    "error, tries",
    [
        (HTTPError(429), 4),
        (HTTPError(503), 4),
        (TimeoutError("read"), 4),
        (ReadTimeout("read"), 4),
        (ConnectionResetError("peer"), 4),
        (FileNotFoundError("429 Client Error: Too Many Requests for url"), 4),
        (HTTPError(404), 1),
        (FileNotFoundError("no such file"), 1),
        (ConnectError("[Errno -2] Name or service not known"), 1),
        (ConnectionError("Couldn't reach the hub"), 1),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), 1),
        (type("ConnectTimeout", (ReadTimeout,), {})("no route"), 1),
    ],
)
def test_only_transient_errors_are_tried_again(error, tries):
    """429 in whatever guise, 5xx, time-outs and broken connections; no route and offline mode are final."""
    calls = []

    def function():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        hub.retry(function, sleep=lambda seconds: None)
    assert len(calls) == tries


def test_the_cause_of_an_error_counts():
    """The hub libraries wrap what happened."""
    error = FileNotFoundError("the data set does not exist")
    error.__cause__ = HTTPError(429)
    assert hub.is_transient(error) and hub.describe(error) == "HTTP 429, too many requests"
