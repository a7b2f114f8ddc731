"""LoRA on the context map: what it trains, what it leaves, and a model like any other at the end."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from config import ResidualConfig
from newllm.errors import UserError
from newllm.models import adapter
from newllm.models.adapter import adapter_rank, add_adapter, has_adapter, merge_adapter
from newllm.models.network import LanguageModel
from newllm.saving.files import load_sealed
from newllm.saving.trained import load_weights, open_saved
from train import main

pytest.importorskip("peft")
V, RANK = 40, 2


@pytest.fixture
def config(tiny_settings):
    settings = dict(
        num_layers=2, context_adapter="lora", adapter_rank=RANK, untrained_control=False, keep_last=40
    )
    return ResidualConfig(**tiny_settings | settings | dict(artifacts=True))


def fresh(config):
    return LanguageModel(config, V).eval()


def outputs(model):
    """Logits of ids one after the other, and the context that a sweep makes without a token stream."""
    ids, state, found = torch.arange(6).view(2, 3), None, []
    for token in ids.T:
        logits, state = model.advance(token, state)
        found.append(logits)
    return torch.stack(found), model.step(state, model.embed(ids[:, 0]), False)[0]


def test_at_first_it_changes_nothing_and_it_alone_of_f_trains(config):
    """The product begins at zero; matrices, norms and the embedding's norm stay as they are; the head trains."""
    model, plain = fresh(config), fresh(config)
    add_adapter(model, RANK, torch.Generator())
    for one, other in zip(outputs(model), outputs(plain), strict=True):
        assert torch.equal(one, other)
    width = config.context_dim + config.embed_dim
    assert sum(parameter.numel() for parameter in model.context_parameters()) == 2 * 2 * RANK * width
    head = {id(parameter) for parameter in model.head_parameters()}
    trains = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trains == head | {id(parameter) for parameter in model.context_parameters()}


def test_the_draw_is_the_generators(config):
    """Not of what peft or anybody has drawn before."""
    models = [fresh(config) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.randn(seed + 1)
        add_adapter(model, RANK, torch.Generator().manual_seed(seed))
    first, again, other = (torch.cat([p.flatten() for p in model.context_parameters()]) for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_merged_it_is_the_plain_network_with_the_same_outputs(config):
    """With and without a token stream: no name of peft is left, all of it may train again."""
    model, plain = fresh(config), fresh(config)
    add_adapter(model, RANK, torch.Generator())
    with torch.no_grad():
        for parameter in model.context_parameters():
            parameter.normal_(0, 0.3)
        before = outputs(model)
        assert not torch.allclose(before[1], outputs(plain)[1], atol=1e-3)
        merge_adapter(model)
        for one, other in zip(outputs(model), before, strict=True):
            torch.testing.assert_close(one, other)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("memory", "rank"), [(8e9, 4), (15.9e9, 4), (16e9, 8), (40e9, 16)])
def test_the_rank_is_that_of_the_setting_or_of_the_memory(config, memory, rank):
    """More memory, more of it."""
    assert adapter_rank(config, memory) == RANK
    assert adapter_rank(dataclasses.replace(config, adapter_rank=0), memory) == rank


def test_a_run_moves_f_by_a_matrix_of_low_rank_and_leaves_a_plain_model(config):
    """Between the end of Phase 1 and the end of the run; its files load without knowing of an adapter."""
    main(config)
    folder = Path(config.checkpoint_dir)
    before, after = (
        load_sealed(folder / f"model_{name}.pt")["model_state_dict"] for name in ("phase1", "latest")
    )
    assert not has_adapter(after)
    for layer in range(2):
        name = f"context_map.layers.{layer}.mix."
        moved = torch.linalg.svdvals(after[name + "weight"] - before[name + "weight"])
        assert moved[RANK - 1] > 1e-4 and moved[RANK:].max() < 1e-5 * moved[0] + 1e-6
        assert torch.equal(after[name + "bias"], before[name + "bias"])
    [exported] = folder.glob("*/models/*.pth")
    state = load_sealed(exported)["model_state_dict"]
    assert all(torch.equal(state[name], after[name]) for name in after)


def test_a_run_continues_exactly_amid_an_adapters_training(config, tmp_path):
    """From each state of Phase 2, also on a machine whose memory asks for another rank, and for who only reads it."""
    by_memory = dataclasses.replace(config, adapter_rank=0, artifacts=False)
    main(by_memory)
    folder = Path(by_memory.checkpoint_dir)
    expected, states = load_sealed(folder / "model_latest.pt"), []
    for path in sorted(folder.glob("model_step_*.pt")):
        found = load_sealed(path)
        if found["stage"] == "phase2" and found["stage_state"] and found["stage_state"]["steps"] > 0:
            states.append(path)
    assert len(states) > 2
    for number, path in enumerate((states[0], states[-1])):
        other = tmp_path / f"again{number}"
        shutil.copytree(folder, other, ignore=shutil.ignore_patterns("model_*.pt", "manifest.json", "*.lock"))
        for kept in [*folder.glob("model_frozen_*.pt"), folder / "model_best.pt"]:
            shutil.copy(kept, other)
        shutil.copy(path, other / "model_latest.pt")
        folder, found = open_saved(other)
        reader = LanguageModel(by_memory, found["model_state_dict"]["embedding.weight"].shape[0])
        load_weights(folder, reader, found)
        assert has_adapter(reader.state_dict())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter, "RANKS", ((float("inf"), 3),))
            main(dataclasses.replace(by_memory, checkpoint_dir=str(other)))
        state = load_sealed(other / "model_latest.pt")["model_state_dict"]
        assert all(torch.equal(state[name], tensor) for name, tensor in expected["model_state_dict"].items())


@pytest.mark.parametrize("changes", [dict(freeze_context=True), dict(model_type="gru")])
def test_without_a_context_map_to_fine_tune_it_is_refused(config, changes):
    """Before anything is read or written."""
    with pytest.raises(UserError, match="context_adapter"):
        dataclasses.replace(config, **changes)


def test_a_missing_package_is_one_sentence(config, monkeypatch):
    """It says what brings it, before the run begins."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"newllm\[lora\]"):
        main(config)
