"""What tests of the data layer share: a hub's answers and rows, dialogues, refusals of one sentence."""

import importlib
import importlib.util

import huggingface_hub
import pytest

from newllm.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# huggingface_hub 1 raises httpx's errors, 2 those of httpx2
httpx = importlib.import_module(huggingface_hub.errors.HTTPError.__module__.partition(".")[0])
NO_NETWORK = httpx.ConnectError("[Errno -2] Name or service not known")
TIMEOUT = httpx.ReadTimeout("slow")
HITS = "cache hit: "


def needs(package):
    """Mark of a test that reads files of an optional package."""
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"needs {package}")


def http_error(status, kind=huggingface_hub.errors.HfHubHTTPError):
    """A refusal of the hub."""
    request = httpx.Request("GET", "https://hub")
    return kind(f"{status} for the url", response=httpx.Response(status, request=request))


def message_of(function, *args):
    """The one sentence by which a call is refused."""
    with pytest.raises(UserError) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def broken(rows, error):
    """A streamed split that breaks behind these rows."""

    class Rows(list):
        def __iter__(self):
            yield from list.__iter__(self)
            raise error

    return Rows(rows)


def dialogue(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"yes, {text}"}]}


def rows(kind, count=40):
    return [dialogue(f"{kind} {number}") for number in range(count)]


def texts(kind, numbers):
    return [f"User: {kind} {number}\nAssistant: yes, {kind} {number}" for number in numbers]


def both(corpus):
    """All texts to train on and all held out."""
    return list(corpus.train()), list(corpus.held_out())


def hit(data):
    """Whether TokenData came from the cache, as its notes say."""
    return any(note.startswith(HITS) for note in data.notes)
