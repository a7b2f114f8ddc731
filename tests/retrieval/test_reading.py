"""A model that looks up predicts the same however its text is read: evaluated, generated, prefilled."""

import contextlib
import io
import json
import math
import shutil

import pytest
import torch
from helpers import TINY_FILE, write_dialogues

import train
from config import ResidualConfig
from newllm.data.samples import load_data
from newllm.errors import UserError
from newllm.evaluate import encode, looked_up_scores, trajectories
from newllm.generate import after, generate, predict, read
from newllm.saving.trained import open_model, open_retrieval
from scripts import evaluate, prefill
from scripts import generate as script

EXACT = contextlib.nullcontext
KINDS = {
    "context": {},
    "context, untied": dict(tie_weights=False),
    "contexts as keys": dict(retrieval_keys="contexts,tokens"),
    "token": dict(model_type="token"),
    "window": dict(model_type="window"),
    "gru": dict(model_type="gru"),
    "lstm": dict(model_type="lstm"),
    "transformer": dict(model_type="transformer"),
}


class Trained:
    """A tiny run that looks up, and what it left."""

    def __init__(self, folder, corpus, **changes):
        self.settings = dict(TINY_FILE) | dict(
            data_source=str(corpus), num_samples=12, context_dim=16, embed_dim=16, phase2_epochs=2,
            phase2_learning_rate=0.002, retrieval="ngram,cache,knn", device="cpu", untrained_control=False,
            cache_dir=str(folder / "cache"), checkpoint_dir=str(folder / "checkpoints"), artifacts=True,
        )  # fmt: skip
        self.settings |= changes
        self.config = ResidualConfig(**self.settings)
        self.summary = train.main(self.config)
        self.folder = folder / "checkpoints"
        [self.file] = self.folder.glob("*/models/*.pth")
        self.model, self.tokenizer, self.content = open_model(self.file)
        self.retrieval = open_retrieval(self.file, self.model, self.content)
        self.model.eval()

    def nats(self, ids):
        """Of targets, as evaluation has them: ids [B, T+1] -> [B, T]."""
        made = trajectories(self.model, ids, EXACT, "cpu")
        return looked_up_scores(self.model, self.retrieval, ids[:, :-1], *made, ids[:, 1:], EXACT)[2]

    def drawn_from(self, ids):
        """Log probabilities [T, V] that generation draws from after each of ids [T]."""
        state, rows = read(self.model, ids[:0], self.retrieval), []
        for token in ids:
            logits, state = predict(self.model, token.view(1), self.retrieval, state)
            rows.append(logits[0])
        return torch.stack(rows)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_dialogues(tmp_path_factory.mktemp("corpus") / "dialogues.jsonl", 60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    return Trained(tmp_path_factory.mktemp("context"), corpus)


@pytest.fixture(scope="module", params=KINDS)
def each_kind(request, tmp_path_factory, corpus):
    return Trained(tmp_path_factory.mktemp("kind"), corpus, **KINDS[request.param])


def text(model, length=24):
    """Some ids; among them a run of one id, and what the training text hardly has."""
    ids = torch.randint(model.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    ids[8:12] = 7
    return ids


def test_generation_draws_from_what_evaluation_measures(each_kind):
    """Every model: log probabilities one token at a time are those of the whole text to five digits.

    They are a distribution at every place, the first included.
    """
    ids = text(each_kind.model)
    logs = each_kind.drawn_from(ids[:-1])
    assert (logs.double().exp().sum(-1) - 1).abs().max() < 1e-5
    chosen = logs.gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(-chosen, each_kind.nats(ids[None])[0], rtol=1e-5, atol=1e-5)


def test_every_model_gains_by_looking_up(each_kind):
    """The figure of the run is there for each kind, and better than that of its network alone."""
    assert each_kind.summary["val_ppl_retrieval"] < each_kind.summary["val_ppl"]
    words = list(generate(each_kind.model, [1, 2], 30, seed=0, retrieval=each_kind.retrieval))
    assert words != list(generate(each_kind.model, [1, 2], 30, seed=0)) and len(words) == 30


@pytest.mark.parametrize("changed", [1, 10, 23])
def test_what_comes_later_changes_nothing_before_it(each_kind, changed):
    """To the bit, the nats of the targets before and what is drawn from."""
    ids = text(each_kind.model)
    other = ids.clone()
    other[changed] = (other[changed] + 1) % each_kind.model.vocab_size
    nats, others = each_kind.nats(ids[None])[0], each_kind.nats(other[None])[0]
    assert (
        torch.equal(nats[: changed - 1], others[: changed - 1]) and nats[changed - 1] != others[changed - 1]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_half_precision_is_the_networks_alone(trained, dtype, how):
    """Keys and mixture are fp32: a distribution to 1e-5, and close to that of the network in fp32."""
    ids, model, retrieval = text(trained.model)[None], trained.model, trained.retrieval
    exact = trained.drawn_from(ids[0])
    autocast = torch.autocast("cpu", dtype) if how == "autocast" else contextlib.nullcontext()
    if how == "weights":
        model, _, _ = open_model(trained.file)
        model.eval().to(dtype)
    with torch.no_grad(), autocast:
        shares, past = retrieval.read(model, ids, *encode(model, ids), retrieval.start(1))
    assert shares.dtype == past.keys.dtype == torch.float32
    assert (shares.double().sum(-1) - 1).abs().max() < 1e-5
    assert (shares[0] - exact.exp()).abs().max() < 0.03


@pytest.mark.parametrize("window", [4, 8, 4096])
def test_a_text_so_far_is_a_state_whichever_way_it_was_read(trained, window, monkeypatch):
    """Token by token, a piece and then the rest, or from contexts at hand: the same text follows."""
    model, retrieval = trained.model, trained.retrieval
    monkeypatch.setattr(retrieval, "window", window)
    ids = text(model, 100)
    contexts = trajectories(model, ids[None], EXACT, "cpu")[0][0]
    halves = read(model, ids[40:-1], retrieval, read(model, ids[:40], retrieval))
    states = [None, halves, after(model, ids[:-1], contexts, retrieval)]
    prompts = [ids.tolist(), ids[-1:].tolist(), ids[-1:].tolist()]
    texts = [
        list(generate(model, prompt, 40, 0, temperature=0, retrieval=retrieval, before=state))
        for prompt, state in zip(prompts, states, strict=True)
    ]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 40
    for state in states[1:]:
        assert state.past.ids.shape[1] == min(window, 99) and state.past.length.item() == 99
        torch.testing.assert_close(state.past.joined().keys, halves.past.joined().keys, rtol=0, atol=1e-4)


def evaluated(capsys, path, *flags):
    evaluate.main([str(path), *flags, "--json"])
    return json.loads(capsys.readouterr().out)


def test_evaluate_gives_the_runs_own_samples_what_a_fit_on_others_gave(trained, capsys, tmp_path):
    """Whatever their file is called now, and for some of them too; what no fit has seen is read."""
    capsys.readouterr()
    for path in (trained.file, trained.folder):
        found = evaluated(capsys, path)
        for name in ("ppl", "bpb"):
            key = f"val_{name}_retrieval"
            assert found[key] == pytest.approx(trained.summary[key], rel=1e-6)
        assert found["val_ppl"] == pytest.approx(trained.summary["val_ppl"], rel=1e-4)
        assert "6 of 6 samples are its run's own" in found["retrieval"]
    copy = shutil.copy(trained.config.data_source, tmp_path / "copy.jsonl")
    known = list(trained.retrieval.held_out.values())
    few = evaluated(capsys, trained.file, "--data_source", str(copy), "--samples", "2")
    assert few["val_loss_retrieval"] == pytest.approx(sum(known[:2]) / 48, rel=1e-6)
    assert "2 of 2" in few["retrieval"]


def test_evaluate_reads_other_texts_as_a_stream(trained, capsys, tmp_path, monkeypatch):
    """The saved gate on each sample; --retrieval none gives the network's figures alone, the same ones."""
    other = write_dialogues(tmp_path / "other.jsonl", 60, seed=5)
    given = "--data_source", str(other), "--samples", "5"
    capsys.readouterr()
    found, alone = (evaluated(capsys, trained.file, *given, *more) for more in ((), ("--retrieval", "none")))
    assert "fitted on none of the 5" in found["retrieval"] and alone["retrieval"] == "none"
    for name in ("loss", "ppl", "acc", "bpb"):
        assert found[f"val_{name}"] == pytest.approx(alone[f"val_{name}"], rel=1e-6)
    seen = []
    real = evaluate.evaluate_retrieval
    monkeypatch.setattr(evaluate, "evaluate_retrieval", lambda *given: seen.append(given[2]) or real(*given))
    evaluated(capsys, trained.file, *given)
    nats = trained.nats(seen[0].long())
    assert found["val_loss_retrieval"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert found["val_ppl_retrieval"] == pytest.approx(math.exp(found["val_loss_retrieval"]))
    assert found["val_ppl_retrieval"] < found["val_ppl"]


def test_a_retrieval_without_a_record_is_not_passed_off_as_held_out(trained):
    trained.retrieval.held_out, held_out = None, trained.retrieval.held_out
    assert "in-sample" in evaluate.described(trained.retrieval, torch.zeros(2, 25).int())
    trained.retrieval.held_out = held_out


@pytest.mark.parametrize(("logits", "length"), [(1, 512), (300 * 7, 3), (1 << 23, 5)])
def test_a_text_is_looked_up_in_pieces_that_change_nothing(trained, monkeypatch, logits, length):
    ids = torch.stack([text(trained.model), text(trained.model).roll(3)])
    whole = trained.nats(ids)
    monkeypatch.setattr("newllm.evaluate.LOOKED_UP_LOGITS", logits)
    monkeypatch.setattr("newllm.evaluate.LOOKED_UP_LENGTH", length)
    torch.testing.assert_close(trained.nats(ids), whole, rtol=1e-5, atol=1e-5)


def test_prefill_predicts_with_what_is_looked_up(trained):
    """Sweeps end where the loop does; what the state takes is said, or that there is none."""
    said = []
    options = prefill.parse_args(ResidualConfig, ["--lengths=20,50", "--tolerance=1e-4"], extra=prefill.flags)
    found = prefill.report(trained.config, options[1], said.append)
    assert all(row["prediction_error"] < 1e-3 for row in found["rows"])
    assert any(line.startswith("retrieval: ngram, cache, knn; ") and "4,096 tokens" in line for line in said)
    hidden = trained.folder / "model_retrieval.pt"
    hidden.rename(trained.folder / "hidden")
    try:
        prefill.report(trained.config, options[1], said.append)
    finally:
        (trained.folder / "hidden").rename(hidden)
    assert any("the network answers alone" in line for line in said)


def test_generate_and_chat_look_up_unless_told_not_to(trained, capsys, monkeypatch):
    """The same seed writes another text; an answer knows what was said before."""
    said = []
    for more in ([], ["--retrieval=none"]):
        script.main([f"--model_path={trained.file}", "--prompt=User: hello", "--max_tokens=20", *more])
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    pasts = []
    real = type(trained.retrieval).remember
    monkeypatch.setattr(
        type(trained.retrieval),
        "remember",
        lambda *given, **made: pasts.append(given[1]) or real(*given, **made),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n"))
    script.main(["--chat", "--max_tokens=5", f"--model_path={trained.folder}"])
    assert len(pasts) == 2 and pasts[1].shape[1] > pasts[0].shape[1]


def test_several_models_predict_by_the_mean_of_their_probabilities(trained, corpus, tmp_path, capsys):
    """Alone and with what the first looks up, whose gate is fitted to the mean anew."""
    elsewhere = shutil.copy(corpus, tmp_path / "elsewhere.jsonl")  # the same text
    first, second = trained, Trained(tmp_path, elsewhere, model_type="gru")
    ids = load_data(first.config).val
    capsys.readouterr()
    alone = evaluated(capsys, first.file, str(first.file), "--retrieval", "none")
    assert alone["models"] == 2
    assert alone["val_ppl"] == pytest.approx(first.summary["val_ppl"], rel=1e-4)
    both = evaluated(capsys, first.file, str(second.file))
    shares = []
    for each in (first, second):
        made = trajectories(each.model, ids, EXACT, "cpu")
        logits = torch.nn.functional.linear(each.model.hidden(*made), *each.model.output_weights())
        shares.append(logits.softmax(-1).gather(-1, ids[:, 1:, None].long()))
    nats = -(sum(shares) / 2).log().mean().item()
    assert both["val_loss"] == pytest.approx(nats, rel=1e-5)
    assert both["val_loss"] < max(each.summary["val_loss"] for each in (first, second))
    repeated = evaluated(capsys, first.file, str(first.file))
    assert repeated["val_ppl_retrieval"] == pytest.approx(first.summary["val_ppl_retrieval"], rel=0.01)


def test_models_of_other_texts_are_not_averaged(trained, corpus, tmp_path, capsys):
    """One sentence says in what they differ."""
    other = Trained(tmp_path, corpus, val_samples=5, model_type="token", retrieval="none")
    with pytest.raises(UserError, match="differs from the first model in val_samples"):
        evaluated(capsys, trained.file, str(other.file))
