"""Texts of dialogues to samples of equally many ids: their beginnings, and what follows behind these."""

import hashlib
from itertools import islice

import torch

from newllm.saving.stop import poll

BATCH = 32  # dialogues encoded in one call, at most
MARGIN = 64  # ids before the end of a cut text that the cut may have changed: more than a word has


def pack(dialogues, tokenizer, count, length, advance=lambda tokens: None):
    """Fill samples with dialogues: behind a short one come the end of text and the next one, never padding.

    Each sample starts with a dialogue of its own; what does not fit of a sample's last dialogue is left out.

    Args:
        dialogues: iterator of texts. No more are taken than the samples need.
        count: samples wanted; fewer come back when the dialogues run out.
        length: predictions per sample, L. advance: called with the tokens made, now and then.

    Returns:
        (int32 [n, L+1] ids, digests of all texts taken, numbers among these of those that begin a sample).
    """
    samples, taken, sample, starts = [], [], [], []
    while len(samples) < count:
        poll()
        # Every sample still missing takes one dialogue at least, so this many are never too many.
        batch = list(islice(dialogues, min(BATCH, count - len(samples))))
        if not batch:
            break
        before, number = len(samples), len(taken)
        taken += map(text_digest, batch)
        for place, ids in enumerate(_starts(tokenizer, batch, length + 1), number):
            if not sample:
                starts.append(place)
            sample += ids[: length + 1 - len(sample)]
            if len(sample) < length + 1:
                sample.append(tokenizer.eos_id)
            if len(sample) == length + 1:
                samples.append(torch.tensor(sample, dtype=torch.int32))
                sample = []
        advance((len(samples) - before) * length)
    packed = torch.stack(samples) if samples else torch.empty(0, length + 1, dtype=torch.int32)
    return packed, taken, starts[: len(samples)]


def later_pieces(dialogues, tokenizer, length):
    """What follows in dialogues behind their first L+1 ids: the second piece of all, then the third, ...

    A piece begins with the last id of the one before it, so each id is a target once; what is left at the end
    of a dialogue is no piece. Each time that pieces run out, twice as much of every dialogue is encoded.

    Args:
        dialogues: function that gives the texts, an iterator, anew.

    Yields:
        (number of the dialogue, int32 [L+1] ids).
    """
    done, depth = 1, 2  # pieces
    while True:
        known = {}
        for number, ids in enumerate(_each_start(tokenizer, dialogues(), depth * length + 1)):
            if len(ids) > (done + 1) * length:
                known[number] = torch.tensor(ids, dtype=torch.int32)
        if not known:
            return
        for piece in range(done, depth):
            for number, ids in known.items():
                if len(ids) > (piece + 1) * length:
                    yield number, ids[piece * length : (piece + 1) * length + 1]
        done, depth = depth, 2 * depth


def _each_start(tokenizer, texts, count):
    """The first `count` ids of each text of an iterator."""
    while batch := list(islice(texts, BATCH)):
        poll()
        yield from _starts(tokenizer, batch, count)


def _starts(tokenizer, texts, count):
    """The first `count` ids of each text, of a short one all: lists of int.

    Of a long text no more is encoded than that takes. A cut changes only the ids just before it, thrown away.
    """
    size = 8 * (count + MARGIN)  # characters in which so many ids are nearly always found
    starts = tokenizer.encode_batch([text[:size] for text in texts])
    for number, text in enumerate(texts):
        reach = size
        while len(starts[number]) < count + MARGIN and reach < len(text):
            poll()
            reach *= 2
            (starts[number],) = tokenizer.encode_batch([text[:reach]])
    return [ids[:count] for ids in starts]


def text_digest(text):
    return hashlib.sha256(text.encode()).digest()
