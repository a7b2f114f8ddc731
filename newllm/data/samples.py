"""Dialogues to packed samples of ids: packing, disjoint splits, the cache file."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
from dataclasses import dataclass
from itertools import chain, islice

import torch

from newllm.data.dialogues import known_labels, open_corpus, pin
from newllm.data.tokens import Tokenizer, train_bpe
from newllm.data.vocabulary import GPT2_FILES, choose_tokenizer, tokenizer_choice
from newllm.errors import UserError
from newllm.progress import silent
from newllm.saving.files import Corrupt, load_sealed, save_sealed, usable_folder
from newllm.saving.stop import poll

FORMAT_VERSION = (
    1  # raise it when rendering, packing or the file's fields change: older cache files are passed over
)
BATCH = 256  # dialogues encoded in one call, at most
MARGIN = 64  # ids before the end of a cut text that the cut may have changed: more than a word has
CHARACTERS = 1 << 22  # encoded in one call, nearly always: each takes about 100 bytes of memory meanwhile
KINDS = {
    "auto": "gpt2",
    "gpt2": "gpt2",
    "bpe": "bpe",
}  # of tokenizer to look for in the cache, by the setting


@dataclass(frozen=True, eq=False)
class TokenData:
    """Training and validation samples from disjoint dialogues; each sample is L predictions, so L+1 ids."""

    train: torch.Tensor  # int32 [num_samples, L+1]
    val: torch.Tensor  # int32 [val_samples, L+1]
    train_dialogue: (
        torch.Tensor
    )  # int64 [num_samples]: index of the sample's first dialogue in the training stream
    val_dialogue: torch.Tensor  # int64 [val_samples]: the same in the held-out stream
    tokenizer: Tokenizer
    token_bytes: torch.Tensor  # int32 [V]: UTF-8 bytes of each id
    source: str  # name of the corpus
    notes: list[str]  # lines to print: what is used and why
    fingerprint: str  # SHA-256 over ids and tokenizer: the identity of the data, for checkpoints
    cache_hit: bool

    @property
    def vocab_size(self):
        return self.tokenizer.vocab_size


def load_data(config, progress=silent):
    """Samples for a configuration; with `tune_share`, the last training samples take the place of the held-out ones.

    Args:
        progress: function of (label, total tokens) to a context manager whose `update` gets the tokens made.

    Raises:
        UserError: the source, tokenizer or cache folder cannot be had, or there are too few dialogues.
    """
    data = load_samples(config, progress)
    if not config.tune_share:
        return data
    count = max(1, round(config.tune_share * len(data.train)))
    if count >= len(data.train):
        raise UserError(
            f"tune_share leaves none of the {len(data.train)} training samples: use more num_samples."
        )
    parts = dict(val=data.train[-count:], val_dialogue=data.train_dialogue[-count:])
    parts |= dict(train=data.train[:-count], train_dialogue=data.train_dialogue[:-count])
    note = f"tuning: validates on the last {count:,} training samples and trains on the others"
    fingerprint = hashlib.sha256(f"{data.fingerprint} {count}".encode()).hexdigest()
    return dataclasses.replace(data, **parts, notes=[*data.notes, note], fingerprint=fingerprint)


def load_samples(config, progress=silent):
    """Training and held-out samples for a configuration: from the cache, else built and cached.

    Args:
        config: newllm.config.Config; its fields under "Data" count.

    Raises:
        UserError: the source, tokenizer or cache folder cannot be had, or there are too few dialogues.
    """
    folder = usable_folder(config.cache_dir, "cache_dir")
    choice = tokenizer_choice(config)
    choose = functools.cache(lambda: choose_tokenizer(choice))
    unusable = {}

    def cached(name, identity, note):
        kind = KINDS.get(choice) or choose()[0].fingerprint
        payload = _read_cache(_cache_path(folder, name, identity, kind, config), unusable)
        if payload is None and choice == "auto" and choose()[0] is None:
            payload = _read_cache(_cache_path(folder, name, identity, "bpe", config), unusable)
        if payload is None:
            return None
        _clear_strays(payload["path"])
        reason = choose()[1] if choice == "auto" and payload["tokenizer_name"] == "bpe" else ""
        return _token_data(
            payload, note, reason, [f"cache hit: {payload['path']}", *_unused(unusable)], cache_hit=True
        )

    # What is known before the corpus is opened is enough for the cache, so a pinned revision in it needs no hub.
    source = pin(config.data_source), config.data_split, config.data_column
    known = known_labels(*source)
    if known and (data := cached(*known)):
        return data
    corpus = open_corpus(*source)
    labels = corpus.name, corpus.identity, corpus.note
    if labels != known and (data := cached(*labels)):
        return data

    tokenizer, reason = choose()
    payload = _build(corpus, tokenizer, config, progress)
    kind = payload["tokenizer_name"] if choice in KINDS else tokenizer.fingerprint
    path = _cache_path(folder, corpus.name, corpus.identity, kind, config)
    notes = []
    try:
        save_sealed(payload | {"recipe": path.name}, path)
        _clear_strays(path)
        if path in unusable:
            notes.append(f"cache: {path} was damaged or foreign ({unusable.pop(path)}) and has been rebuilt")
    except OSError as error:
        notes.append(f"cache: {path} could not be written ({error}), so the next run builds the data again")
    return _token_data(payload, corpus.note, reason, [*notes, *_unused(unusable)], cache_hit=False)


# Packing


def pack(dialogues, tokenizer, count, length, advance=lambda tokens: None):
    """Fill samples with dialogues: a short one is followed by the end of text and the next one, never by padding.

    Each sample starts with a dialogue of its own; what does not fit of a sample's last dialogue is left out.

    Args:
        dialogues: iterator of (index, text). No more are taken than the samples need.
        count: samples wanted; fewer come back when the dialogues run out.
        length: predictions per sample, L. advance: called with the tokens made, now and then.

    Returns:
        (int32 [n, L+1] ids, int64 [n] index of each sample's first dialogue, list of the digests of all texts taken).
    """
    samples, first, taken, sample = [], [], [], []
    at_once = min(BATCH, max(1, CHARACTERS // _start_size(length + 1)))
    while len(samples) < count:
        poll()
        # Every sample still missing takes one dialogue at least, so this many are never too many.
        batch = list(islice(dialogues, min(at_once, count - len(samples))))
        if not batch:
            break
        taken += [_text_digest(text) for _, text in batch]
        before = len(samples)
        for (index, _), ids in zip(
            batch, _starts(tokenizer, [text for _, text in batch], length + 1), strict=True
        ):
            if not sample:
                first.append(index)
            sample += ids[: length + 1 - len(sample)]
            if len(sample) < length + 1:
                sample.append(tokenizer.eos_id)
            if len(sample) == length + 1:
                samples.append(torch.tensor(sample, dtype=torch.int32))
                sample = []
        advance((len(samples) - before) * length)
    ids = torch.stack(samples) if samples else torch.empty(0, length + 1, dtype=torch.int32)
    return ids, torch.tensor(first[: len(samples)], dtype=torch.int64), taken


def _start_size(count):
    """Characters of a text in which `count` ids and the margin are nearly always found."""
    return 8 * (count + MARGIN)


def _starts(tokenizer, texts, count):
    """The first `count` ids of each text, of a short one all: lists of int.

    Of a long text no more is encoded than that takes. A cut changes only the ids just before it, which are thrown away.
    """
    size, starts = _start_size(count), []
    for text, ids in zip(texts, tokenizer.encode_batch([text[:size] for text in texts]), strict=True):
        reach = size
        while len(ids) < count + MARGIN and reach < len(text):
            poll()
            reach *= 2
            (ids,) = tokenizer.encode_batch([text[:reach]])
        starts.append(ids[:count])
    return starts


def _text_digest(text):
    return hashlib.sha256(text.encode()).digest()


def _build(corpus, tokenizer, config, progress):
    """Both splits and the tokenizer (trained here if None) as the content of a cache file."""
    wanted, length, size = config.num_samples, config.max_seq_length, corpus.size
    if size is not None and size < wanted + config.val_samples:
        raise _too_few(corpus, config, f"at least {wanted + config.val_samples:,}")
    stream = corpus.train()
    # A bpe tokenizer sees the first num_samples training dialogues: each sample starts with a dialogue of its own, so
    # these lie within the training budget whatever the tokenizer. Held-out texts among them are taken out, and as the
    # held-out dialogues in use depend on the tokenizer, that is repeated until the two are disjoint.
    head, held, trained = [], set(), tokenizer is None
    if trained:
        head = list(islice(stream, wanted))
    while True:
        lesson = [text for text in head if _text_digest(text) not in held]
        if trained:
            tokenizer = train_bpe(lesson, config.vocab_size, progress)
        val, val_dialogue, val_taken = pack(
            enumerate(corpus.held_out()), tokenizer, config.val_samples, length
        )
        if set(val_taken).isdisjoint(map(_text_digest, lesson)):
            break
        held.update(val_taken)
    held, skipped = set(val_taken), []

    def training_dialogues():
        for index, text in islice(
            enumerate(chain(head, stream)), None if size is None else size - len(val_taken)
        ):
            if _text_digest(text) in held:
                skipped.append(index)
            else:
                yield index, text

    with progress("data", wanted * length) as bar:
        train, train_dialogue, train_taken = pack(training_dialogues(), tokenizer, wanted, length, bar.update)
    if len(train) < wanted or len(val) < config.val_samples:
        share = (wanted + config.val_samples) / max(1, len(train) + len(val))
        raise _too_few(corpus, config, f"about {math.ceil(share * (size or 0)) + 1:,}", len(train), len(val))
    assert held.isdisjoint(train_taken)
    remarks = list(corpus.remarks)
    if skipped:
        remarks.append(f"data: {len(skipped):,} training dialogues with the text of a held-out one left out")
    return dict(
        train=train,
        val=val,
        train_dialogue=train_dialogue,
        val_dialogue=val_dialogue,
        tokenizer_name=tokenizer.name,
        tokenizer_json=tokenizer.to_json(),
        source=corpus.name,
        remarks=remarks,
        fingerprint=_fingerprint(train, val, tokenizer.to_json()),
    )


def _too_few(corpus, config, needed, num_train=0, num_val=0):
    samples = f"{config.num_samples:,} training + {config.val_samples:,} validation samples of {config.max_seq_length} tokens"
    if corpus.size is None:
        have = f"are more than {corpus.name} gives ({num_train:,} + {num_val:,})"
    else:
        have = f"need {needed} dialogues; {corpus.name} has {corpus.size:,}"
    return UserError(f"{samples} {have}: lower num_samples or val_samples.")


# Cache


def _cache_path(folder, name, identity, kind, config):
    """Where the data of a recipe lies; the name carries the recipe's digest.

    Args:
        kind: "gpt2", "bpe", or the fingerprint of another tokenizer.
    """
    trained_here = [config.vocab_size, importlib.metadata.version("tokenizers")]
    recipe = dict(
        format=FORMAT_VERSION,
        corpus=identity,
        tokenizer={"gpt2": GPT2_FILES, "bpe": trained_here}.get(kind, kind),
        samples=[config.num_samples, config.val_samples, config.max_seq_length],
    )
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{name}_{config.num_samples}samples_{config.max_seq_length}len-{key}.pt"


def _read_cache(path, unusable):
    """Content of a cache file, None if there is none or it is not usable; the reason then goes to `unusable`."""
    try:
        payload = load_sealed(path)
        if not isinstance(payload, dict) or payload.get("recipe") != path.name:
            raise Corrupt("made for another recipe")
        if payload["fingerprint"] != _fingerprint(
            payload["train"], payload["val"], payload["tokenizer_json"]
        ):
            raise Corrupt("its ids are not those it was written with")
        return payload | {"path": path}
    except FileNotFoundError:
        return None
    except (Corrupt, OSError, KeyError) as error:
        unusable[path] = str(error).removeprefix(f"{path} ")
        return None


def _clear_strays(path):
    """Delete temporary files of builders that were killed, or that lost the race to a file that is there."""
    for stray in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            stray.unlink()


def _unused(unusable):
    return [
        f"cache: {path} is damaged or foreign ({reason}) and was not used"
        for path, reason in unusable.items()
    ]


def _token_data(payload, corpus_note, reason, notes, cache_hit):
    tokenizer = Tokenizer.from_json(payload["tokenizer_name"], payload["tokenizer_json"])
    kind = f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids"
    if tokenizer.name == "bpe":
        kind += ", trained on the training dialogues" + (f" ({reason})" if reason else "")
    return TokenData(
        **{
            name: payload[name]
            for name in ("train", "val", "train_dialogue", "val_dialogue", "source", "fingerprint")
        },
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes(),
        notes=[corpus_note, kind, *payload["remarks"], *notes],
        cache_hit=cache_hit,
    )


def _fingerprint(train, val, tokenizer_json):
    digest = hashlib.sha256(tokenizer_json.encode())
    for ids in (train, val):
        digest.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
    return digest.hexdigest()
