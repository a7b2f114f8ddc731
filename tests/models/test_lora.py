"""LoRA on the context map: what it trains, what it leaves, and a model like any other at the end."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import stop_after

from config import ResidualConfig
from newllm.errors import UserError
from newllm.models import pretrained
from newllm.models.network import LanguageModel
from newllm.models.pretrained import adapter_rank, add_adapter, merge_adapter, saved_rank
from newllm.saving.files import load_sealed
from newllm.saving.trained import load_weights, open_saved
from train import main

pytest.importorskip("peft")
V, RANK = 40, 2


@pytest.fixture
def config(tiny_settings):
    adapter = dict(num_layers=2, context_adapter="lora", adapter_rank=RANK)
    return ResidualConfig(**tiny_settings | adapter, untrained_control=False)


def outputs(model):
    """Logits of ids one after the other, and the context that a sweep makes without a token stream."""
    ids, state, logits = torch.arange(6).view(2, 3), None, []
    for token in ids.T:
        *place, state = model.advance(token, state)
        found = model.logits(*place)
        logits.append(found)
    return torch.stack(logits), model.step(state, model.embed(ids[:, 0]), False)[0]


@torch.no_grad()
def test_at_first_it_changes_nothing_and_merged_it_is_the_plain_network(config):
    """Its draw is the generator's; it alone of F trains, beside the head; no name of peft is left."""
    plain, drawn = LanguageModel(config, V).eval(), []
    for seed in (0, 0, 1):
        torch.randn(seed + 1)
        model = LanguageModel(config, V).eval()
        add_adapter(model, RANK, torch.Generator().manual_seed(seed))
        drawn.append(torch.cat([p.flatten() for p in model.context_parameters()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len(drawn[0]) == 2 * 2 * RANK * (config.context_dim + config.embed_dim)
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), outputs(plain), strict=True))
    listed = [id(parameter) for parameter in [*model.head_parameters(), *model.context_parameters()]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for parameter in model.context_parameters():
        parameter.normal_(0, 0.3)
    before = outputs(model)
    assert not torch.allclose(before[1], outputs(plain)[1], atol=1e-3)
    merge_adapter(model)
    torch.testing.assert_close(outputs(model), before)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("memory", "rank"), [(8e9, 4), (15.9e9, 4), (16e9, 8), (40e9, 16)])
def test_the_rank_is_that_of_the_setting_or_of_the_memory(config, memory, rank):
    """More memory, more of it."""
    assert adapter_rank(RANK, memory) == RANK
    assert adapter_rank(0, memory) == rank


def test_a_run_moves_f_by_a_matrix_of_low_rank_and_continues_exactly(config, monkeypatch):
    """The rest of F stays and files load without an adapter. Stopped in Phase 2 a run continues to the same
    bits, also where the memory asks for another rank, and who only reads its state has the adapter."""
    main(config)
    folder = Path(config.checkpoint_dir)
    before = load_sealed(folder / "model_phase1.pt")["model_state_dict"]
    after = load_sealed(folder / "model_latest.pt")["model_state_dict"]
    assert saved_rank(after) is None
    for layer in range(2):
        name = f"context_map.layers.{layer}.mix."
        moved = torch.linalg.svdvals(after[name + "weight"] - before[name + "weight"])
        assert moved[RANK - 1] > 1e-4 and moved[RANK:].max() < 1e-5 * moved[0] + 1e-6
        assert torch.equal(after[name + "bias"], before[name + "bias"])

    monkeypatch.setattr(pretrained, "RANKS", ((float("inf"), RANK),))
    by_memory = dataclasses.replace(config, adapter_rank=0, checkpoint_dir=str(folder.parent / "again"))
    stop_after(by_memory, 9 + 5)  # in Phase 2
    files, state = open_saved(by_memory.checkpoint_dir)
    assert state["stage"] == "phase2" and state["stage_state"]["steps"] > 0
    reader = LanguageModel(by_memory, state["model_state_dict"]["embedding.weight"].shape[0])
    load_weights(files, reader, state)
    assert saved_rank(reader.state_dict()) == RANK
    monkeypatch.setattr(pretrained, "RANKS", ((float("inf"), RANK + 1),))
    main(by_memory)
    again = load_sealed(Path(by_memory.checkpoint_dir) / "model_latest.pt")["model_state_dict"]
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def test_what_cannot_have_an_adapter_is_refused(config, monkeypatch):
    """Without a context map to fine-tune; without the package, with what brings it, before the run begins."""
    for changes in (dict(freeze_context=True), dict(model_type="gru")):
        with pytest.raises(UserError, match="context_adapter"):
            dataclasses.replace(config, **changes)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"newllm\[lora\]"):
        main(config)
