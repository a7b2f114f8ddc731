"""A transformers model that looks things up has the project's own probabilities, in any type and batch."""

from itertools import chain

import pytest
import torch

from newllm.evaluate import encode
from newllm.retrieval.mixture import AT_ONCE, EXPERTS

pytest.importorskip("transformers")
from mixtures import V, made

from newllm import transformers_model
from newllm.transformers_model import NewLLMForCausalLM


def texts(batch=2, length=40):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def own(model, ids):
    """Probabilities [B, T, V] by network and retrieval of the project, the whole text at once."""
    retrieval = model.retrieval
    return retrieval.read(model.network, ids, *encode(model.network, ids), retrieval.start(len(ids)))[0]


@pytest.mark.parametrize("window", [16, 4096])
@pytest.mark.parametrize("experts", [("ngram",), ("cache",), ("knn",), EXPERTS])
def test_its_probabilities_are_those_of_the_project(experts, window):
    """Of all places or the last, of texts longer than the window and than what is looked up at once."""
    model, ids = made(experts, window), texts(length=2 * AT_ONCE + 7)
    expected = own(model, ids)
    assert (len(model.retrieval.store.following) > 0) == ("knn" in experts)  # and nothing for nothing
    assert (len(model.retrieval.ngram.levels) > 1) == ("ngram" in experts)
    with torch.no_grad():
        logits, last = model(ids).logits, model(ids, logits_to_keep=3).logits
    assert logits.dtype == torch.float32 and (logits.exp().sum(-1) - 1).abs().max() < 1e-4
    torch.testing.assert_close(logits.exp(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(last.exp(), expected[:, -3:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", ["window", "token"])
def test_so_are_those_of_the_other_networks(network):
    model, ids = made(EXPERTS, network=network), texts()
    torch.testing.assert_close(model(ids).logits.exp(), own(model, ids), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3)], ids=["greedy", "beams"])
def test_a_prompt_longer_than_the_window(options):
    """Generation with a cache is that without one, also behind padding; the state is bounded."""
    model, ids = made(EXPERTS, window=8, eos_token_id=None), texts(3)
    mask = (torch.arange(40) >= torch.tensor([[0], [25], [36]])).long()
    given = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    cached = model.generate(ids, **given, **options)
    assert cached.sequences.equal(model.generate(ids, **given, **options, use_cache=False).sequences)
    past = cached["cache" if "cache" in cached else "past_key_values"].past
    assert past.ids.shape[1] == sum(part.shape[1] for part in past if part.dim() == 3) == 8
    if not options:
        assert past.length.tolist() == [51, 26, 15]


def test_padding_inside_of_texts_changes_nothing():
    """Texts of a batch that go on by turns of different length, and padding on the right before that."""
    model = made(EXPERTS, window=12)
    turns = [[[3, 4, 5, 3, 4], [6, 3, 4], [5, 3]], [[7, 8, 9], [7, 8, 9, 10, 7, 8], [9]], [[2], [], [2, 3]]]
    cache, sides = None, ("left", "right", "left")
    found = [[] for _ in turns]
    for turn, side in enumerate(sides):
        rows = [torch.tensor(text[turn], dtype=torch.int64) for text in turns]
        options = dict(batch_first=True, padding_side=side)
        ids = torch.nn.utils.rnn.pad_sequence(rows, padding_value=1, **options)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], **options)
        output = model(ids, attention_mask=mask, cache=cache)
        cache = output.cache
        for row, logits in enumerate(output.logits):
            found[row].append(logits[mask[row] > 0])
    for row, text in enumerate(turns):
        alone = model(torch.tensor([list(chain(*text))])).logits[0]
        torch.testing.assert_close(torch.cat(found[row]), alone, rtol=1e-4, atol=1e-5)
    assert cache.past.length.tolist() == [10, 10, 3]


def same(one, other):
    """Whether two state dicts have the same tensors, in type and to the bit."""
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_type_is_one_for_the_network_alone(tmp_path, dtype):
    """Loaded or converted: counts, keys and gate are as they were, and so is the prediction, to rounding."""
    model, ids = made(EXPERTS), texts()
    kept = {name: tensor.clone() for name, tensor in model.retrieval.state_dict().items()}
    model.save_pretrained(tmp_path)
    expected = own(model, ids).log()
    loaded = NewLLMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    converted = model.half() if dtype == torch.float16 else model.to(dtype)
    for other in (loaded, converted):
        assert other.dtype == other.network.embedding.weight.dtype == dtype
        assert same(other.retrieval.state_dict(), kept)
        with torch.no_grad():
            logits = other(ids).logits
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().mean() < 10 * torch.finfo(dtype).eps + 1e-5
        other.generate(ids, max_new_tokens=3)
    assert torch.get_default_dtype() == torch.float32


def test_its_network_alone(tmp_path):
    """Without what it looks up it is another model, which stays so when saved, and takes new tokens."""
    model, ids = made(EXPERTS), texts()
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="retrieval='none'"):
        model.resize_token_embeddings(V + 3)
    assert model.resize_token_embeddings().num_embeddings == V
    for nothing in ("none", None):
        alone = NewLLMForCausalLM.from_pretrained(tmp_path / "whole", retrieval=nothing)
        assert alone(ids).logits.equal(model.network.logits(*encode(model.network, ids)))
        alone.resize_token_embeddings(V + 3)
        alone.save_pretrained(tmp_path / "alone")
        again = NewLLMForCausalLM.from_pretrained(tmp_path / "alone")
        assert again(ids).logits.equal(alone(ids).logits) and again.retrieval is None
    with pytest.raises(ValueError, match="retrieval='ngram': give 'none'"):
        NewLLMForCausalLM.from_pretrained(tmp_path / "whole", retrieval="ngram")


def test_training_it_is_possible_and_advised_against(monkeypatch):
    """Gradients of the mixture's loss reach the network; a line says what to do instead."""
    said = []
    monkeypatch.setattr(transformers_model.logger, "warning_once", said.append)
    model, ids = made(EXPERTS).train(), texts()
    loss = model(ids, labels=ids.masked_fill(torch.arange(40) < 20, -100)).loss
    assert ["retrieval='none'" in line for line in said] == [True]
    loss.backward()
    assert model.network.embedding.weight.grad.isfinite().all()
    expected = own(model.eval(), ids)[:, 19:-1].log().gather(-1, ids[:, 20:, None]).mean()
    torch.testing.assert_close(loss, -expected, rtol=1e-4, atol=1e-5)
