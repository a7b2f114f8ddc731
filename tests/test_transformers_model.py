"""The model behaves as transformers' own do: cache, padding, decoding, refusals, labels, Trainer, sizes."""

import importlib.metadata
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch

from newllm.generate import generate
from newllm.retrieval.mixture import EXPERTS
from newllm.versions import outside

transformers = pytest.importorskip("transformers")
from mixtures import V, made  # noqa: E402

B, T = 3, 9


@pytest.fixture(
    params=[dict(), dict(network="window"), dict(experts=EXPERTS)], ids=["context", "window", "mixture"]
)
def model(request):
    return made(**request.param, eos_token_id=None)


@pytest.fixture
def ids():
    return torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(0))


def cache_of(output):
    """By the name that this version gives it."""
    return output["cache" if "cache" in output else "past_key_values"]


def greedy(model, ids, count, **options):
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


# State


def test_greedy_is_the_same_with_and_without_cache_and_by_our_own_generation(model, ids):
    """Three roads, one text; a static cache is passed over, and said."""
    cached = greedy(model, ids, 12)
    for options in (dict(use_cache=False), dict(logits_to_keep=0), dict(cache_implementation="static")):
        assert cached.equal(greedy(model, ids, 12, **options))
    for row in range(B):
        prompt, looked_up = ids[row].tolist(), model.retrieval
        own = list(generate(model.network, prompt, 12, seed=0, temperature=0, retrieval=looked_up))
        assert cached[row, T:].tolist() == own


def test_padding_on_the_left_and_company_change_nothing(model, ids):
    """A text alone, in a batch, and behind padding of any content: the same logits and continuation."""
    lengths = torch.tensor([T, T - 4, T - 1])
    mask = (torch.arange(T) >= T - lengths[:, None]).long()
    padded = torch.where(mask > 0, ids, 7)
    logits = model(padded, attention_mask=mask).logits
    texts = greedy(model, padded, 6, attention_mask=mask)
    for row, n in enumerate(lengths):
        alone = ids[row : row + 1, T - n :]
        torch.testing.assert_close(logits[row, T - n :], model(alone).logits[0], rtol=1e-5, atol=1e-6)
        assert texts[row, T:].equal(greedy(model, alone, 6)[0, n:])


@pytest.mark.parametrize("name", ["cache", "cache_params", "past_key_values"])
def test_a_cache_continues_a_text(model, ids, name):
    """In pieces, by each of the names that transformers has had for it; the state has one size."""
    whole, cache, pieces = model(ids).logits, None, []
    for start, end in ((0, 4), (4, 5), (5, T)):
        output = model(ids[:, start:end], **{name: cache})
        cache = getattr(output, name)
        assert cache is cache_of(output)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
    assert cache.context.shape == (B, 32)
    assert getattr(model(ids, use_cache=False), name) is None


def test_generation_resumes_from_the_cache_it_returns(model, ids):
    """By the last token, which no step has read yet, and by that and a further turn."""
    for turn in (ids[:, :0], ids):
        first = greedy(model, ids, 4, return_dict_in_generate=True)
        whole = greedy(model, torch.cat([first.sequences, turn], 1), 3)
        unread = torch.cat([first.sequences[:, -1:], turn], 1)
        assert greedy(model, unread, 3, cache=cache_of(first)).equal(whole[:, T + 3 :])


@torch.no_grad()
def test_a_prompt_by_sweeps_is_the_prompt_by_steps(model, ids):
    """Within the tolerance, from a state too, and behind padding."""
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in ({}, dict(attention_mask=mask), dict(start=ids[:, :4])):
        logits = []
        for model.config.prefill in ("steps", "sweeps"):
            given = dict(options)
            if "start" in given:
                given = dict(cache=cache_of(model(given["start"])))
            logits.append(model(ids, **given).logits)
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_nothing_that_the_installed_version_will_drop_is_used(model, ids, caplog):
    """Generation and a call that reads on give no warning of a deprecation."""
    transformers.logging.get_logger().addHandler(caplog.handler)
    with warnings.catch_warnings(record=True) as said, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        first = greedy(model, ids, 2, return_dict_in_generate=True, num_beams=2)
        model(ids[:, :1], cache=model(ids).cache)
        assert cache_of(first) is not None
    transformers.logging.get_logger().removeHandler(caplog.handler)
    assert not [text for text in (*map(str, said), caplog.text) if "deprecat" in text]


# Decoding


DECODING = {
    "sampling": dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, num_return_sequences=2),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "processed": dict(repetition_penalty=1.5, no_repeat_ngram_size=2, bad_words_ids=[[7]]),
    "guided": dict(guidance_scale=2.0),
    "ended": dict(eos_token_id=list(range(0, V, 4)), pad_token_id=0, min_new_tokens=2),
}


@pytest.mark.parametrize("options", DECODING.values(), ids=DECODING)
def test_every_decoding_is_the_same_with_and_without_cache(model, ids, options):
    """Texts, logits and scores of each step, also behind padding; a cached step reads one token."""
    mask = (torch.arange(T) >= torch.tensor([[0], [4], [1]])).long()
    given = dict(attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True) | options
    show = dict(output_logits=True, output_scores=True, output_hidden_states=True)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(ids, **given, **show, use_cache=use_cache))
    cached, afresh = found
    assert cached.sequences.equal(afresh.sequences) and T + 2 <= cached.sequences.shape[1] <= T + 4
    assert len(cached.sequences) == B * options.get("num_return_sequences", 1)
    for name in ("logits", "scores"):
        torch.testing.assert_close(cached[name], afresh[name], rtol=1e-4, atol=1e-5)
    assert [step[0].shape[1] for step in cached.hidden_states] == [T, 1, 1, 1][: len(cached.hidden_states)]
    assert [step[0].shape[1] for step in afresh.hidden_states][:2] == [T, T + 1]
    if "num_beams" in options:
        torch.testing.assert_close(cached.sequences_scores, afresh.sequences_scores)


def test_a_streamer_gets_a_text_as_it_is_drawn(model, ids):
    """Token by token, the same ids."""
    streamed = []
    take = dict(put=lambda tokens: streamed.extend(tokens.flatten().tolist()), end=lambda: None)
    assert greedy(model, ids[:1], 8, streamer=SimpleNamespace(**take))[0].tolist() == streamed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(prompt_lookup_num_tokens=2), "not supported with stateful models"),
        (dict(prefill_chunk_size=3), "without a cache"),
        (dict(past_key_values=transformers.DynamicCache()), "cache_params"),
        (dict(inputs_embeds=torch.zeros(1, T, 24)), "cache_params"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_a_state_cannot_do_is_refused(model, ids, options, reason):
    """A state cannot be rolled back, and has no keys and values: an error rather than a wrong text."""
    with pytest.raises(ValueError, match=reason):
        greedy(model, ids[:1], 4, **options)


# Training


def test_labels_and_the_positions_to_keep(model, ids):
    """The loss is that of the next token, ignored labels apart; logits of the last positions only."""
    output = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.network.embedding.weight.grad.abs().sum() > 0
    labels = ids.clone()
    labels[:, :-1] = -100
    last = torch.nn.functional.cross_entropy(output.logits[:, -2], ids[:, -1])
    torch.testing.assert_close(model(ids, labels=labels).loss, last)
    for kept in (2, torch.tensor([4, 1])):
        place = slice(-kept, None) if isinstance(kept, int) else kept
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, output.logits[:, place])


def test_transformers_trainer_trains_it(ids, tmp_path):
    """Two steps lower the loss that it evaluates."""
    settings = dict(max_steps=2, learning_rate=0.01, report_to="none", save_strategy="no", use_cpu=True)
    rows = [dict(input_ids=row, labels=row) for row in ids]
    arguments = transformers.TrainingArguments(str(tmp_path), **settings)
    trainer = transformers.Trainer(made(), arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before < 10


# Sizes and folders


@pytest.fixture(params=[dict(tie_word_embeddings=False), dict(keeps_embedding=True), dict(network="token")])
def sized(request):
    """A model whose output prefers the smaller ids."""
    model = made(eos_token_id=3, pad_token_id=3, **request.param)
    model.network.output_bias.data = -torch.arange(float(V))
    return model


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (dict(new_num_tokens=V - 20), V - 20),
        (dict(new_num_tokens=V + 7, pad_to_multiple_of=16), 64),
        ({}, V),
    ],
    ids=str,
)
def test_another_number_of_tokens(sized, tmp_path, options, size):
    """Ids that stay have the logits they had, new ones are no likelier than the least likely.

    Saved and loaded by the Auto classes every tensor is the same, and the model generates and trains.
    """
    ids = torch.randint(0, V - 20, (2, T), generator=torch.Generator().manual_seed(0))
    before = sized(ids).logits
    sized.resize_token_embeddings(**options)
    logits, kept = sized(ids).logits, min(size, V)
    assert logits.shape[-1] == sized.config.vocab_size == size
    torch.testing.assert_close(logits[..., :kept], before[..., :kept])
    if size > V:
        assert logits[..., kept:].mean() < logits[..., : kept // 2].mean()
        assert sized.network.embedding.weight[V:].std() < 3 * sized.network.embedding.weight[:V].std()
        sized(torch.tensor([[size - 1, 2]]))
    sized.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    mine, theirs = sized.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)
    assert greedy(loaded, ids, 3).equal(greedy(sized, ids, 3))
    loss = loaded(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and (tmp_path / "model.safetensors").exists()


def test_ids_that_cannot_be_taken_away_or_are_lacking_are_named(sized):
    """The end of text stays, and the model is as it was; an id as after add_tokens without a larger model."""
    before = {name: tensor.clone() for name, tensor in sized.state_dict().items()}
    for size in (3, 0, -5):
        with pytest.raises(ValueError, match="at least 4 tokens"):
            sized.resize_token_embeddings(size)
    after = sized.state_dict()
    assert sized.config.vocab_size == V and all(after[name].equal(before[name]) for name in before)
    with pytest.raises(ValueError, match=f"hold {V}, .*resize_token_embeddings"):
        sized.generate(torch.tensor([[1, V]]), max_new_tokens=2)


def test_versions_outside_the_tested_range_are_named(monkeypatch):
    """Below, above, in it, not installed."""
    installed = {"low": "1.9.1", "high": "2.0", "fine": "1.9.1+cpu", "early": "2.0.dev1"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = outside(["low>=1.10,<2", "high>=1.0,<2", "fine>=1.9,<2", "early>=1,<3", "absent>=1"])
    assert [text.split(",")[0] for text in said] == ["low is 1.9.1", "high is 2.0"] and "<2" in said[0]
