"""Packing by hand: the first ids of each dialogue, end of text behind a short one, no padding."""

import random

import pytest
import torch
from checks import needs_gpt2

from newllm.data.samples import pack
from newllm.data.tokens import train_bpe
from newllm.data.vocabulary import load_gpt2


class Letters:
    """a -> 1, b -> 2, ...; 0 ends a text."""

    eos_id = 0

    def encode_batch(self, texts):
        return [[ord(letter) - 96 for letter in text] for text in texts]


def packed(texts, count, length):
    ids, first, taken = pack(enumerate(texts), Letters(), count, length)
    return ids.tolist(), first.tolist(), len(taken)


def test_long_dialogue_gives_its_first_ids():
    """L+1 ids; the rest is left out and the next sample starts with the next dialogue."""
    assert packed(["abcdef", "ghijk"], 2, 3) == ([[1, 2, 3, 4], [7, 8, 9, 10]], [0, 1], 2)


def test_short_dialogue_is_followed_by_end_of_text_and_the_next():
    """The rest of the second dialogue does not begin the next sample."""
    assert packed(["ab", "cdef", "ghij"], 2, 3) == ([[1, 2, 0, 3], [7, 8, 9, 10]], [0, 2], 3)


def test_dialogues_at_the_edge():
    """Of exactly L+1 ids: no end of text. Of L ids: the end of text is the last id."""
    assert packed(["abcd", "efg", "hijk"], 3, 3) == (
        [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 10, 11]],
        [0, 1, 2],
        3,
    )


def test_unfilled_sample_is_not_padded():
    """Fewer samples come back, without their share of dialogue indices."""
    assert packed(["abcdef", "ab", "c"], 2, 5) == ([[1, 2, 3, 4, 5, 6]], [0], 3)


def test_no_dialogue_is_read_in_vain():
    """Lazily: a stream gives exactly the dialogues in use, also across batches."""
    stream = enumerate("abc" for _ in range(10**9))
    ids, first, taken = pack(stream, Letters(), 300, 5)
    assert ids.shape == (300, 6) and len(taken) == 600 and next(stream)[0] == 600
    assert (
        first.tolist() == list(range(0, 600, 2)) and ids.dtype == torch.int32 and first.dtype == torch.int64
    )


def test_of_a_long_dialogue_no_more_is_encoded_than_its_sample_needs():
    """Whatever the text: the beginning, then twice as much while that gives too few ids."""

    class Counting(Letters):
        read = 0

        def encode_batch(self, texts):
            self.read += sum(map(len, texts))
            return [
                [1] * (len(text) // 100) for text in texts
            ]  # a hundred characters an id, as of a repeated letter

    counting = Counting()
    ids, _, _ = pack(iter([(0, "a" * 10_000_000)]), counting, 1, 20)
    assert ids.tolist() == [[1] * 21] and counting.read < 40_000


@pytest.mark.parametrize(
    "train", [lambda: train_bpe(TEXTS[:20], 600), pytest.param(load_gpt2, marks=needs_gpt2)]
)
def test_the_beginning_of_a_text_has_the_ids_that_the_whole_text_has(train):
    """To the id, wherever the text was cut: words, blanks, digits, other scripts, lines."""
    tokenizer = train()
    for length in (1, 7, 30):
        ids, _, _ = pack(enumerate(TEXTS), tokenizer, len(TEXTS), length)
        whole = tokenizer.encode_batch(TEXTS)
        assert ids.tolist() == [each[: length + 1] for each in whole]


SOURCE = random.Random(0)
PIECES = [
    "hello",
    " there",
    "  ",
    "\n\n",
    "don't",
    "'ll",
    " 2026",
    "\u6771\u4eac",
    "\U0001f642",
    "e\u0301",
    "!?...",
    "\t",
]
TEXTS = ["".join(SOURCE.choices(PIECES, k=1000)) for _ in range(40)]
