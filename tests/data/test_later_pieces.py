"""More samples than dialogues: what follows in these is used too, and nothing else changes."""

import itertools

import torch
from fakes import dialogue, hit, message_of

from newllm.data import packing, samples, tokens
from newllm.data.packing import later_pieces
from newllm.data.samples import load_data


class Words:
    """A word -> its number; counts the words it has read."""

    eos_id, read = 0, 0

    def encode_batch(self, texts):
        self.read += sum(len(text.split()) for text in texts)
        return [[int(word[1:]) for word in text.split()] for text in texts]


def of(tokenizer, lengths, pieces, length=4):
    """The first pieces of texts that count from a hundred times their number on."""
    texts = [" ".join(f"w{100 * n + place}" for place in range(many)) for n, many in enumerate(lengths)]
    found = later_pieces(lambda: iter(texts), tokenizer, length)
    return [(number, ids.tolist()) for number, ids in itertools.islice(found, pieces)]


def test_pieces_follow_each_other_and_all_dialogues_take_turns():
    """By hand: whole ones alone, each from the last id of the one before; of 9, 8, 17 and 3 ids, L = 4."""
    assert of(Words(), (9, 8, 17, 3), 9) == [
        (0, [4, 5, 6, 7, 8]),
        (2, [204, 205, 206, 207, 208]),
        (2, [208, 209, 210, 211, 212]),
        (2, [212, 213, 214, 215, 216]),
    ]


def test_what_is_read_grows_with_what_is_asked_for(monkeypatch):
    """Of one endless dialogue among short ones: no more than a few times the pieces that are taken."""
    monkeypatch.setattr(packing, "MARGIN", 1)
    for pieces in (10, 100, 400):
        tokenizer = Words()
        found = of(tokenizer, (100_000, 9, 9), pieces)
        assert len(found) == pieces and found[-1][1][-1] == 4 * (pieces - 1)
        assert tokenizer.read < 100 * pieces + 1000


def numbered(settings, write_jsonl, counts, **changes):
    """Data of dialogues whose words name them, by a tokenizer that is there before: `u3` is of dialogue 3."""
    rows = [dialogue(" ".join(f"u{n}." for _ in range(count))) for n, count in enumerate(counts)]
    given = dict(data_source=str(write_jsonl(rows)), tokenizer="own", max_seq_length=8, val_samples=3)
    return load_data(settings(**given | changes))


def dialogues_in(data, rows):
    """Numbers of the dialogues that each of these samples has words of."""
    texts = [data.tokenizer.decode(ids) for ids in rows.tolist()]
    return [{part.split(".")[0] for part in text.split("u")[1:] if "." in part} for text in texts]


def fixed_tokenizer(monkeypatch):
    made = tokens.train_bpe([" ".join(f"u{n}." for n in range(100))], 400)
    monkeypatch.setattr(samples, "choose_tokenizer", lambda choice: (made, ""))


def test_a_larger_budget_begins_with_a_smaller_one(settings, write_jsonl, monkeypatch):
    """Below, at and beyond the number of dialogues; those held out stay the same, and unseen.

    A line says how many samples are no beginnings, and the cache gives the same again.
    """
    fixed_tokenizer(monkeypatch)
    counts = [10 + 7 * (n % 5) for n in range(20)]
    made = [numbered(settings, write_jsonl, counts, num_samples=n) for n in (10, 17, 18, 30, 50)]
    for smaller, larger in itertools.pairwise(made):
        assert torch.equal(larger.train[: len(smaller.train)], smaller.train)
        assert torch.equal(larger.val, smaller.val) and larger.fingerprint != smaller.fingerprint
    assert made[0].origins is made[1].origins is None
    most = made[-1]
    held_out = set().union(*dialogues_in(most, most.val))
    assert held_out.isdisjoint(set().union(*dialogues_in(most, most.train)))
    assert len({tuple(ids) for ids in most.train[:, 1:].tolist()}) > 17
    assert (
        "data: 33 of 50 training samples are later pieces of dialogues, as talk gives only 17 that "
        in str(most.notes)
    )
    assert "left out" not in str(most.notes)
    again = numbered(settings, write_jsonl, counts, num_samples=50)
    assert hit(again) and torch.equal(again.origins, most.origins)


def test_a_share_is_taken_from_dialogues_that_nothing_else_has(settings, write_jsonl, monkeypatch):
    """Also where samples are later pieces, and two shares at once; each has about the size asked for."""
    fixed_tokenizer(monkeypatch)
    counts = [3 if n % 3 else 30 for n in range(30)]  # some samples hold several dialogues
    data = numbered(settings, write_jsonl, counts, num_samples=60, tune_share=0.2, fit_share=0.2)
    parts = [data.train, data.held_back, data.val]
    assert sum(map(len, parts)) == 60 and 12 <= len(data.val) <= 20 and 10 <= len(data.held_back) <= 18
    words = [set().union(*dialogues_in(data, rows)) for rows in parts]
    assert all(words) and not any(words[a] & words[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    monkeypatch.setattr(samples, "ENOUGH_TO_FIT", 2)
    data = numbered(settings, write_jsonl, [9] * 30, num_samples=20, fit_share=0.5)
    assert len(data.held_back) == 2 and len(data.train) == 18
    few = dict(num_samples=3, fit_share=0.2, val_samples=1)  # of one dialogue, which would be taken whole
    assert "fit_share leaves none of 3" in message_of(
        lambda _: numbered(settings, write_jsonl, [60, 20], **few), None
    )


def test_what_a_corpus_has_at_most_is_said(settings, write_jsonl, monkeypatch):
    """Later pieces are counted in."""
    fixed_tokenizer(monkeypatch)
    text = message_of(lambda _: numbered(settings, write_jsonl, [40] * 6, num_samples=500), None)
    given = int(text.split("gives (")[1].split(" +")[0])
    assert f"500 training + 3 validation samples of 8 tokens are more than talk gives ({given} + 3)" in text
    data = numbered(settings, write_jsonl, [40] * 6, num_samples=given)
    assert len(data.train) == given > 3
