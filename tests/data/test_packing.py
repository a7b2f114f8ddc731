"""Packing by hand: the first ids of each dialogue, end of text behind a short one, no padding."""

import torch

from newllm.data.dataset import pack


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
    assert packed(["abcd", "efg", "hijk"], 3, 3) == ([[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 10, 11]], [0, 1, 2], 3)


def test_unfilled_sample_is_not_padded():
    """Fewer samples come back, without their share of dialogue indices."""
    assert packed(["abcdef", "ab", "c"], 2, 5) == ([[1, 2, 3, 4, 5, 6]], [0], 3)


def test_no_dialogue_is_read_in_vain():
    """Lazily: a stream gives exactly the dialogues in use, also across batches."""
    stream = enumerate("abc" for _ in range(10**9))
    ids, first, taken = pack(stream, Letters(), 300, 5)
    assert ids.shape == (300, 6) and len(taken) == 600 and next(stream)[0] == 600
    assert first.tolist() == list(range(0, 600, 2)) and ids.dtype == torch.int32 and first.dtype == torch.int64
