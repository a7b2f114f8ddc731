"""Dialogues to packed samples of ids: packing, disjoint splits, the cache file."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from itertools import chain, islice

import torch

from newllm.data.dialogues import available, find_corpus
from newllm.data.tokens import GPT2_FILES, Tokenizer, choose_tokenizer, tokenizer_choice, train_bpe
from newllm.errors import UserError
from newllm.progress import silent
from newllm.saving.files import Corrupt, load_sealed, save_sealed, usable_folder
from newllm.saving.stop import poll

FORMAT_VERSION = (
    1  # raise it when rendering, packing or the file's fields change: older files are passed over
)
BATCH = 256  # dialogues encoded in one call, at most
MARGIN = 64  # ids before the end of a cut text that the cut may have changed: more than a word has
CHARACTERS = 1 << 22  # encoded in one call, nearly always: each takes about 100 bytes of memory meanwhile


@dataclass(frozen=True, eq=False)
class TokenData:
    """Training and validation samples from disjoint dialogues; each sample is L predictions, so L+1 ids."""

    train: torch.Tensor  # int32 [num_samples, L+1]
    val: torch.Tensor  # int32 [val_samples, L+1]
    train_dialogue: (
        torch.Tensor
    )  # int64 [num_samples]: index of a sample's first dialogue in the training stream
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


def load_data(settings, progress=silent):
    """Samples for a configuration; with `tune_share`, the last training samples are held out instead.

    Args:
        settings: newllm.config.DataSettings.
        progress: function of (label, total tokens) to a context manager whose `update` gets the tokens made.

    Raises:
        UserError: the source, tokenizer or cache folder cannot be had, or there are too few dialogues.
    """
    data = _load_samples(settings, progress)
    if not settings.tune_share:
        return data
    count = max(1, round(settings.tune_share * len(data.train)))
    if count >= len(data.train):
        raise UserError(
            f"tune_share leaves none of {len(data.train)} training samples: use more num_samples."
        )
    note = f"tuning: validates on the last {count:,} training samples and trains on the others"
    return dataclasses.replace(
        data,
        train=data.train[:-count],
        val=data.train[-count:],
        train_dialogue=data.train_dialogue[:-count],
        val_dialogue=data.train_dialogue[-count:],
        notes=[*data.notes, note],
        fingerprint=hashlib.sha256(f"{data.fingerprint} {count}".encode()).hexdigest(),
    )


def _load_samples(settings, progress):
    """Training and held-out samples: from the cache, if possible without the hub, else built and cached."""
    folder = usable_folder(settings.cache_dir, "cache_dir")
    choice = tokenizer_choice(settings)
    chosen = functools.cache(lambda: choose_tokenizer(choice))
    notes = []

    def cached(corpus):
        """(path, content or None) of the corpus's cache file."""
        for kind in _kinds(choice, chosen):
            path = _cache_path(folder, corpus, kind, settings)
            if payload := _read_cache(path, notes):
                break
        return path, payload

    corpus = find_corpus(settings.data_source, settings.data_split, settings.data_column)
    path, payload = cached(corpus)
    if payload is None:
        wanted, corpus = corpus, available(corpus, settings.data_source)
        if corpus is not wanted:
            path, payload = cached(corpus)
    hit = payload is not None
    if hit:
        notes.insert(0, f"cache hit: {path}")
    else:
        payload = _build(corpus, chosen()[0], settings, progress) | {"recipe": path.name}
        try:
            save_sealed(payload, path)
        except OSError as error:
            notes.append(f"cache: {path} could not be written ({error}); the next run builds the data again")
    if path.exists():
        _clear_strays(path)
    tokenizer = Tokenizer.from_json(payload["tokenizer_name"], payload["tokenizer_json"])
    kind = f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids"
    if tokenizer.name == "bpe":
        reason = chosen()[1]
        kind += ", trained on the training dialogues" + (f" ({reason})" if reason else "")
    names = ("train", "val", "train_dialogue", "val_dialogue", "source", "fingerprint")
    return TokenData(
        **{name: payload[name] for name in names},
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes(),
        notes=[corpus.note, kind, *payload["remarks"], *notes],
        cache_hit=hit,
    )


# Packing


def pack(dialogues, tokenizer, count, length, advance=lambda tokens: None):
    """Fill samples with dialogues: behind a short one come the end of text and the next one, never padding.

    Each sample starts with a dialogue of its own; what does not fit of a sample's last dialogue is left out.

    Args:
        dialogues: iterator of (index, text). No more are taken than the samples need.
        count: samples wanted; fewer come back when the dialogues run out.
        length: predictions per sample, L. advance: called with the tokens made, now and then.

    Returns:
        (int32 [n, L+1] ids, int64 [n] index of each sample's first dialogue, digests of all texts taken).
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
        starts = _starts(tokenizer, [text for _, text in batch], length + 1)
        for (index, _), ids in zip(batch, starts, strict=True):
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

    Of a long text no more is encoded than that takes. A cut changes only the ids just before it, thrown away.
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


def _build(corpus, tokenizer, settings, progress):
    """Both splits and the tokenizer (trained here if None) as the content of a cache file."""
    wanted, length, size = settings.num_samples, settings.max_seq_length, corpus.size()
    stream = corpus.train()
    head, held, trained = [], set(), tokenizer is None
    # A bpe tokenizer sees the first num_samples training dialogues: each sample starts with a dialogue of its
    # own, so these lie within the training budget whatever the tokenizer. Held-out texts among them are taken
    # out, and as the held-out dialogues in use depend on the tokenizer, until the two are disjoint.
    if trained:
        head = list(islice(stream, wanted))
    while True:
        lesson = [text for text in head if _text_digest(text) not in held]
        if trained:
            tokenizer = train_bpe(lesson, settings.vocab_size, progress)
        held_out = enumerate(corpus.held_out())
        val, val_dialogue, taken = pack(held_out, tokenizer, settings.val_samples, length)
        if set(taken).isdisjoint(map(_text_digest, lesson)):
            break
        held.update(taken)
    held, skipped = set(taken), 0

    def training_dialogues():
        nonlocal skipped
        rest = None if size is None else max(0, size - len(taken))
        for index, text in islice(enumerate(chain(head, stream)), rest):
            if _text_digest(text) in held:
                skipped += 1
            else:
                yield index, text

    with progress("data", wanted * length) as bar:
        train, train_dialogue, train_taken = pack(training_dialogues(), tokenizer, wanted, length, bar.update)
    if len(train) < wanted or len(val) < settings.val_samples:
        raise UserError(
            f"{wanted:,} training + {settings.val_samples:,} validation samples of {length} tokens are more "
            f"than {corpus.name} gives ({len(train):,} + {len(val):,}): lower num_samples or val_samples."
        )
    assert held.isdisjoint(train_taken)
    remarks = list(corpus.remarks())
    if skipped:
        remarks.append(f"data: {skipped:,} training dialogues with the text of a held-out one left out")
    text = tokenizer.to_json()
    about = dict(source=corpus.name, remarks=remarks, fingerprint=_fingerprint(train, val, text))
    about |= dict(tokenizer_name=tokenizer.name, tokenizer_json=text)
    return about | dict(train=train, val=val, train_dialogue=train_dialogue, val_dialogue=val_dialogue)


# Cache


def _kinds(choice, chosen):
    """Tokenizers to look for in the cache: "gpt2", "bpe", or another's fingerprint; the last is in use.

    Args:
        chosen: () -> what `choose_tokenizer` gives; called only where needed, as that may ask the hub.
    """
    if choice in ("gpt2", "bpe"):
        yield choice
    elif choice != "auto":
        yield chosen()[0].fingerprint
    else:
        yield "gpt2"
        if chosen()[0] is None:
            yield "bpe"


def _cache_path(folder, corpus, kind, settings):
    """Where the data of a recipe lies; the name carries the recipe's digest."""
    trained_here = [settings.vocab_size, importlib.metadata.version("tokenizers")]
    recipe = {
        "format": FORMAT_VERSION,
        "corpus": corpus.identity,
        "tokenizer": {"gpt2": GPT2_FILES, "bpe": trained_here}.get(kind, kind),
        "samples": [settings.num_samples, settings.val_samples, settings.max_seq_length],
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{corpus.name}_{settings.num_samples}samples_{settings.max_seq_length}len-{key}.pt"


def _read_cache(path, notes):
    """Content of a cache file, or None; if it is there and not usable, `notes` get the reason."""
    try:
        payload = load_sealed(path)
        if not isinstance(payload, dict) or payload.get("recipe") != path.name:
            raise Corrupt("made for another recipe")
        ids = payload["train"], payload["val"]
        if payload["fingerprint"] != _fingerprint(*ids, payload["tokenizer_json"]):
            raise Corrupt("its ids are not those it was written with")
        return payload
    except FileNotFoundError:
        return None
    except (Corrupt, OSError, KeyError) as error:
        why = str(error).removeprefix(f"{path} ")
        notes.append(f"cache: {path} was damaged or foreign ({why}) and is replaced when it is built")
        return None


def _clear_strays(path):
    """Delete temporary files of builders that were killed, or that lost the race to a file that is there."""
    for stray in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            stray.unlink()


def _fingerprint(train, val, tokenizer_json):
    digest = hashlib.sha256(tokenizer_json.encode())
    for ids in (train, val):
        digest.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
    return digest.hexdigest()
