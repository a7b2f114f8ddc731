"""Text to ids and back, and a byte-level BPE trained on the training dialogues.

Built with the `tokenizers` library itself: transformers 5 turns GPT2TokenizerFast(vocab_file=, merges_file=) silently
into a tokenizer of one token.
"""

import hashlib
import re

from newllm.interrupt import interruptible, poll
from newllm.progress import silent

END_OF_TEXT = "<|endoftext|>"
BYTE = re.compile("<0x[0-9A-F]{2}>")
MARGIN = 64  # ids before the end of a cut text that the cut may have changed: more than a word has
LONGEST_WORD = 1024  # bytes of what the trainer takes for a word: its time grows with their square
LESSON = 1_000_000  # characters of one dialogue that a tokenizer is trained on, at most


class Tokenizer:
    """A BPE over bytes, or one that falls back to them, with an id that ends a text; a literal "<|endoftext|>" is plain text.

    Args:
        name: "gpt2", "bpe" or that of a pretrained model.
        text: the `tokenizers` JSON; kept as it is, so the fingerprint outlives upgrades of that library.
    """

    def __init__(self, name, text):
        import tokenizers

        self.name, self._json = name, text
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.eos_id = self._tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def from_json(cls, name, text):
        return cls(name, text)

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
        return [encoding.ids for encoding in interruptible(self._tokenizer.encode_batch, list(texts))]

    def encode_starts(self, texts, count):
        """The first `count` ids of each text, of a short one all: list of lists of int.

        Of a long text no more is read than that takes, so its length costs nothing. Where a text is cut only the last
        ids depend on what follows; MARGIN of them are thrown away.
        """
        size, starts = start_size(count), []
        for text, ids in zip(texts, self.encode_batch(text[:size] for text in texts), strict=True):
            reach = size
            while len(ids) < count + MARGIN and reach < len(text):
                reach *= 4
                ids = self.encode_batch([text[:reach]])[0]
            starts.append(ids[:count])
        return starts

    def decode(self, ids):
        """Text of a list of int, the end-of-text id as "<|endoftext|>"; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def decoder(self):
        """A `Decoder`, for ids that come one after the other."""
        return Decoder(self)

    def is_byte(self, token):
        """Whether an id is one of the single bytes that a vocabulary of characters falls back to."""
        return BYTE.fullmatch(self._tokenizer.id_to_token(token) or "") is not None

    def token_bytes(self):
        """UTF-8 bytes each id stands for: int32 [V], 0 for the end of text."""
        import torch

        spellings = [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]
        if '"ByteFallback"' in self._json:  # characters, spaces as U+2581, and bytes as <0x00>
            sizes = [
                1 if BYTE.fullmatch(spelling) else len(spelling.replace("\u2581", " ").encode())
                for spelling in spellings
            ]
        else:  # every character of a token's spelling stands for one byte
            sizes = [len(spelling) for spelling in spellings]
        sizes[self.eos_id] = 0
        return torch.tensor(sizes, dtype=torch.int32)


class Decoder:
    """Text of ids that come one after the other: all pieces and the rest together are what `decode` makes of all ids."""

    def __init__(self, tokenizer):
        self._tokenizer, self._open = tokenizer, []

    def __call__(self, token):
        """The text that an id completes; "" while it may be a part of a character."""
        self._open.append(token)
        text = self._tokenizer.decode(self._open)
        # A byte may still belong to the character, or to the invalid bytes, that the next id goes on with.
        if text.endswith("\ufffd") or self._tokenizer.is_byte(token):
            return ""
        self._open = []
        return text

    def rest(self):
        """What the last ids left open, as it is: an unfinished character is U+FFFD."""
        ids, self._open = self._open, []
        return self._tokenizer.decode(ids)


def start_size(count):
    """Characters of a text in which nearly always `count` ids are found."""
    return 8 * (count + MARGIN)


def train_bpe(texts, vocab_size, progress=silent):
    """Byte-level BPE of at most `vocab_size` ids; id 0 ends a text, every byte has an id, so every text round-trips.

    Args:
        progress: function of (label, total, unit) to a context manager whose `update` gets the characters read.
    """
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # the library returns it in random order
        show_progress=False,
    )
    words = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(length=LONGEST_WORD)])
    lesson = [text[:LESSON] for text in texts]
    with progress("tokenizer", sum(map(len, lesson)), unit="char") as bar:

        def read():
            for text in lesson:
                yield text
                poll()
                bar.update(len(text))

        interruptible(tokenizer.train_from_iterator, read(), trainer)
    tokenizer.pre_tokenizer = words
    return Tokenizer("bpe", tokenizer.to_str())


def byte_level(model):
    """A `tokenizers` tokenizer that spells texts in bytes, as GPT-2's does, around a model of merges."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
