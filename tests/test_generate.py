"""Generation: the same logits as reading the whole text at once, greedy without chance, draws that the seed decides."""

import io
from pathlib import Path

import pytest
import torch

from config import ResidualConfig
from newllm.errors import UserError
from newllm.evaluate import encode
from newllm.generate import generate
from newllm.models.baselines import build_model
from scripts import generate as script
from train import main as train

V, T = 40, 12


@pytest.fixture(params=["context", "window", "token", "gru", "lstm", "transformer"])
def model(request):
    config = ResidualConfig(model_type=request.param, context_dim=24, embed_dim=16, num_layers=2, max_seq_length=T)
    return build_model(config, V).eval()


@torch.no_grad()
def test_one_token_at_a_time_is_the_whole_text(model):
    """Logits after each token, as evaluation has them, for two texts at once."""
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    expected, state = model.logits(*encode(model, ids)), None
    for t in range(T):
        logits, state = model.advance(ids[:, t], state)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-5)


def test_greedy_is_the_likeliest_token_each_time(model):
    """Whatever the seed; longer than a sample, and the end of a text ends it."""
    found = list(generate(model, [1, 2], 3 * T, seed=0, temperature=0))
    assert found == list(generate(model, [1, 2], 3 * T, seed=1, temperature=0)) and len(found) == 3 * T
    state = None
    for token in (1, 2):
        logits, state = model.advance(torch.tensor([token]), state)
    assert found[0] == logits.argmax().item()
    assert list(generate(model, [1, 2], 3 * T, seed=0, temperature=0, eos_id=found[0])) == []


def test_the_seed_decides_the_draws_and_the_filters_narrow_them(model):
    """Same seed, same text; top_k = 1 and a tiny nucleus are greedy; all tokens are drawn without filters."""
    one, two, other = (list(generate(model, [1], 60, seed=seed)) for seed in (0, 0, 1))
    assert one == two != other and len(set(one)) > V // 3
    greedy = list(generate(model, [1], 20, seed=0, temperature=0))
    assert list(generate(model, [1], 20, seed=5, top_k=1)) == greedy
    assert list(generate(model, [1], 20, seed=5, top_p=1e-6)) == greedy
    assert list(generate(model, [1], 20, seed=5, temperature=1e-4)) == greedy


@pytest.mark.parametrize(
    "settings", [{}, {"freeze_context": True}, {"model_type": "gru"}], ids=["tuned", "frozen", "gru"]
)
def test_the_command_writes_with_what_was_trained(tiny_settings, tmp_path, capsys, monkeypatch, settings):
    """From a folder, a checkpoint and a model file, greedy the same; a conversation; a sentence where there is nothing."""
    train(ResidualConfig(**tiny_settings | dict(artifacts=True), **settings))
    folder = tiny_settings["checkpoint_dir"]
    capsys.readouterr()
    flags = ["--prompt", "User: hello", "--temperature", "0", "--max_tokens", "12", "--model_path"]
    script.main([*flags, folder])
    text = capsys.readouterr().out
    assert text.startswith("User: hello") and len(text) > len("User: hello\n")
    script.main([*flags, f"{folder}/model_best.pt"])
    assert capsys.readouterr().out == text
    (alone,) = Path(folder).glob("*/models/*.pth")
    alone = alone.rename(tmp_path / "alone.pth")
    with monkeypatch.context() as nothing_else:
        nothing_else.setattr("newllm.training.trained.load_data", None)
        script.main([*flags, str(alone)])
    assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand more\n"))
    script.main(["--chat", "--max_tokens", "5", "--model_path", folder])
    assert "User:" not in capsys.readouterr().out
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no whole checkpoint"):
        script.main(["--model_path", str(empty)])
    real = script.open_saved
    monkeypatch.setattr(script, "open_saved", lambda path: (real(path)[0], real(path)[1] | {"stage": "untrained"}))
    with pytest.raises(UserError, match="has trained nothing yet"):
        script.main(["--model_path", folder])
    with pytest.raises(UserError, match="top_p lies in"):
        script.main(["--top_p", "0"])
