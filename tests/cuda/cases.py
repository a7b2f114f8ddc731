"""What must hold on a CUDA device, tried on a pretended one, by test_pretended_cuda.py."""

import collections
import contextlib
import copy
import dataclasses
import itertools
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_gpu as gpu
import torch
from pretended import DEVICE, OnDevice, Refused, pretended_cuda

from config import ResidualConfig
from newllm import evaluate
from newllm.fixed_point import solver
from newllm.fixed_point.diagnostics import cold_start
from newllm.fixed_point.losses import phase1_loss
from newllm.fixed_point.solver import prefill, sequential
from newllm.generate import generate
from newllm.models.network import ContextMap, LanguageModel
from newllm.report.page import artifact_paths
from newllm.report.record import RunLog, find_records, read_record
from newllm.saving.checkpoint import Checkpointer
from newllm.saving.files import load_sealed
from newllm.saving.stop import Interrupt, Stopped
from newllm.saving.trained import load_model, open_saved
from newllm.training import step_function
from newllm.training.contexts import LOST, StoredContexts
from newllm.training.runtime import Group, open_runtime
from newllm.training.step_function import StepFunction
from scripts import export
from scripts import prefill as prefill_command
from train import main

T4, A100 = (7, 5), (8, 0)
HALF = {T4: torch.float16, A100: torch.bfloat16}
LENGTH = 8
ENDS = {}  # frozen or not: validation loss and weights of a run on a T4 that nothing happened to


@pytest.fixture
def settings(tiny_settings, monkeypatch):
    """A tiny run as a user of a GPU starts it: device and precision are left to the program."""
    monkeypatch.setattr(evaluate, "MAX_SWEEPS", 12)
    small = dict(num_layers=2, phase1_max_iterations=2, phase2_epochs=2, max_seq_length=LENGTH, val_samples=3)
    return tiny_settings | dict(device="auto", precision="auto", untrained_control=False) | small


def elsewhere(config, name, **changes):
    return dataclasses.replace(config, checkpoint_dir=f"{config.checkpoint_dir}_{name}", **changes)


def run(card, config):
    """The summary of a run on this card."""
    with pretended_cuda(card):
        return main(config)


def end_of(config, summary):
    """(validation loss, weights) of a complete run."""
    latest = load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")
    return summary["val_loss"], latest["model_state_dict"]


def uninterrupted(config):
    if config.freeze_context not in ENDS:
        whole = elsewhere(config, "whole", context_memory_mb=512)
        ENDS[config.freeze_context] = end_of(whole, run(T4, whole))
    return ENDS[config.freeze_context]


def same(one, other):
    return one[0] == other[0] and all(torch.equal(one[1][name], weight) for name, weight in other[1].items())


def run_until(monkeypatch, card, config, stage, saves=2):
    """Run on this card, and stop in order when so many saves of a stage have been due."""
    asked, real = collections.Counter(), Checkpointer.due

    def due(self, batch):
        asked[self.stage] += 1
        if asked[stage] == saves:
            Interrupt.current.signal = signal.SIGTERM
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "due", due)
        with pytest.raises(Stopped):
            run(card, config)


def printed(capsys):
    """Lines since the last call."""
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def watched(monkeypatch):
    """What runs do to `counts`: (launches, waits) of steps by stage, launches a token of recordings."""
    seen, at = SimpleNamespace(counts=None, steps={}, recorded=[]), []
    own_status, own_record = RunLog.status, step_function.record

    def status(self, progress, stage, epoch, batch, **where):
        now = seen.counts.launches, seen.counts.waits
        # Neither the first step of an epoch nor the last, which measures too.
        if epoch > 1 and batch not in (1, where["batches"]):
            seen.steps.setdefault(stage, []).append((now[0] - at[0], now[1] - at[1]))
        at[:] = now
        return own_status(self, progress, stage=stage, epoch=epoch, batch=batch, **where)

    def record(*work):
        before = seen.counts.launches
        made = own_record(*work)
        seen.recorded.append((seen.counts.launches - before) / LENGTH)
        return made

    monkeypatch.setattr(RunLog, "status", status)
    monkeypatch.setattr(step_function, "record", record)
    return seen


@pytest.mark.parametrize("card", [T4, A100], ids=["T4", "A100"])
def test_a_whole_run(settings, watched, card, capsys):
    """In the card's own type, with the figures of a CPU in fp32, within rounding; few launches, few waits."""
    quiet = dict(untrained_control=True, val_quick_every_n_batches=0, save_every_n_batches=10**6)
    config = ResidualConfig(**settings | quiet)
    with pretended_cuda(card) as watched.counts:
        found = main(config)
    lines = printed(capsys)
    assert any({T4: "precision fp16", A100: "precision bf16"}[card] in line for line in lines)
    assert not any("warning" in line for line in lines)
    for stage, ceiling in {"phase1": (250, 2), "untrained": (100, 2), "phase2": (700, 2)}.items():
        launches, waits = map(max, zip(*watched.steps[stage], strict=True))
        with capsys.disabled():
            print(f"{stage}: {launches} launches and {waits} waits a step")
        assert launches <= ceiling[0] and waits <= ceiling[1]
    assert max(watched.recorded) <= 40  # launches a token
    watched.counts = SimpleNamespace(launches=0, waits=0)
    expected = main(elsewhere(config, "cpu", device="cpu", precision="fp32"))
    # Not the bits: dropout draws otherwise there.
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=0.02)
    assert found["er_val"] == pytest.approx(expected["er_val"], rel=0.05)
    assert found["phase1_steps"] == expected["phase1_steps"]


@pytest.mark.parametrize(
    ("stage", "megabytes"), [("untrained", 0), ("phase1", 512), ("phase1", 0), ("phase2", 512)], ids=str
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(settings, monkeypatch, capsys, stage, megabytes):
    """Continued inside the control, Phase 1 and Phase 2, with contexts in memory and in files."""
    control = stage == "untrained"
    own = dict(context_memory_mb=megabytes, freeze_context=control, untrained_control=control)
    config = ResidualConfig(**settings | own)
    expected = uninterrupted(config)
    run_until(monkeypatch, T4, config, stage)
    printed(capsys)
    assert same(end_of(config, run(T4, config)), expected) and LOST not in printed(capsys)


@pytest.mark.parametrize(
    ("before", "after", "megabytes"), [(T4, A100, 0), (A100, T4, 512)], ids=["T4, files", "A100, memory"]
)
def test_a_run_goes_on_with_its_contexts_on_another_card(
    settings, monkeypatch, capsys, before, after, megabytes
):
    """Stopped inside Phase 1: the next card starts from the stored contexts, in its own type."""
    config = ResidualConfig(**settings, context_memory_mb=megabytes)
    # In the second sweep, which starts from the first one's.
    run_until(monkeypatch, before, config, "phase1", saves=5)
    with pretended_cuda(before):  # in memory, where contexts take the place of those they were made from
        stored = _restored(dataclasses.replace(config, context_memory_mb=512))
    with pretended_cuda(after):
        converted = _restored(config)
    assert (stored.dtype, converted.dtype) == (HALF[before], HALF[after])
    assert stored.float().norm() > 1
    assert (converted.float() - stored.float()).norm() < 0.01 * stored.float().norm()
    printed(capsys)
    assert math.isfinite(run(after, config)["val_loss"]) and LOST not in printed(capsys)


def _restored(config):
    """The contexts that a run of this configuration would go on from, as they lie on the CPU."""
    saved = load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["stage_state"]["contexts"]
    sizes = config.num_samples, config.context_dim, config
    contexts = StoredContexts(*sizes, open_runtime(config), config.checkpoint_dir)
    contexts.restore(saved, None, pytest.fail)
    return contexts.first(config.num_samples).cpu()


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer", "window", "lora"])
def test_other_networks(settings, monkeypatch, kind):
    """Each baseline, a control and low-rank additions: trained, stopped, continued and evaluated."""
    changes = dict(model_type=kind, context_dim=32)
    if kind == "lora":
        pytest.importorskip("peft")
        changes = dict(context_adapter="lora", adapter_rank=4, phase1_max_iterations=0)
    config = ResidualConfig(**settings | changes)
    run_until(monkeypatch, T4, config, "phase2")
    assert math.isfinite(run(T4, config)["val_loss"])


def test_memory_runs_out_at_a_constant_effective_batch(settings, monkeypatch, capsys):
    """The batch is done again in parts; what was recorded for the whole is dropped, and made anew."""
    plain = dict(dropout=0.0, token_dropout=0.0, phase1_max_iterations=0)
    config = ResidualConfig(**settings | plain)
    expected = run(T4, config)
    own, forget, forgotten = StepFunction.trajectory, step_function.Graphs.forget, []

    def forgets(self):
        forgotten.append(len(getattr(self, "recorded", ())))
        forget(self)

    def trajectory(self, tokens, start):
        found = own(self, tokens, start)
        if len(tokens) > 2:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return found

    monkeypatch.setattr(step_function.Graphs, "forget", forgets)
    monkeypatch.setattr(StepFunction, "trajectory", trajectory)
    printed(capsys)
    found = run(T4, elsewhere(config, "small"))
    assert sum("out of memory" in line and "a step as before" in line for line in printed(capsys)) == 1
    assert sum(forgotten) == 1
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)
    assert found["phase2_steps"] == expected["phase2_steps"]


def test_a_capture_that_fails_costs_a_line_and_no_bits(settings, monkeypatch, capsys):
    """The run goes on step by step; the line comes once a stage, not once a batch."""
    config = ResidualConfig(**settings)
    expected = uninterrupted(config)
    printed(capsys)

    @contextlib.contextmanager
    def capture(graph, **options):
        yield
        raise RuntimeError("CUDA error: not allowed")

    with pretended_cuda(T4):
        monkeypatch.setattr(torch.cuda, "graph", capture)
        found = end_of(config, main(config))
    warnings = [line for line in printed(capsys) if "warning" in line]
    assert len(warnings) == 1 and "not allowed); going on without" in warnings[0]
    assert same(found, expected)


def test_prefill_text_and_export(settings, tmp_path, monkeypatch):
    """Of a finished run: long sequences by sweeps and the loop, text token by token, the export."""
    config = ResidualConfig(**settings | dict(artifacts=True))
    monkeypatch.setattr(prefill_command, "MAX_SWEEPS", 10**6)
    monkeypatch.setattr(solver, "SHORTEST_TRIAL", 8)
    way = prefill_command.read_text  # the loop is said to take long
    monkeypatch.setattr(prefill_command, "read_text", lambda *given: way(*given[:-3], 1e9, *given[-2:]))
    with pretended_cuda(T4):
        main(config)
        options = dict(lengths=[20, 40], tolerance=[1e-2, 1e-4], trained=True)
        rows = prefill_command.report(config, SimpleNamespace(**options), lambda line: None)["rows"]
    assert len(rows) == 4
    assert all(row["by_sweeps"] and row["error"] < 2 * row["tolerance"] + 2e-3 for row in rows)
    record = read_record(find_records(config.checkpoint_dir)[-1])
    path = artifact_paths(record.folder, "context", record.run)["model"]
    model, tokenizer = load_model(open_saved(path)[1])
    prompt, folder = tokenizer.encode("User: ban dor"), tmp_path / "exported"
    expected = list(generate(model, prompt, 12, seed=3))
    export.main(f"--checkpoint_dir {config.checkpoint_dir} --format transformers --output {folder}".split())
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    greedy = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        text = exported.generate(torch.tensor([prompt]), **greedy)
        logits = exported(torch.tensor([prompt])).logits
        with pretended_cuda(T4):
            assert list(generate(model.to("cuda"), prompt, 12, seed=3)) == expected
            moved = exported.to("cuda")
            ids = torch.tensor([prompt]).to("cuda")
            for way in ("sweeps", "loop"):
                moved.config.prefill = way
                torch.testing.assert_close(moved(ids).logits.cpu(), logits, rtol=1e-3, atol=1e-3)
                assert moved.generate(ids, **greedy).tolist() == text.tolist()


@pytest.mark.parametrize("card", [T4, A100], ids=["T4", "A100"])
def test_sweeps_take_what_autocast_gives_a_step(card):
    """A step in another type than the buffers' is written to them: fp32, half, and a step of both."""
    with pretended_cuda(card):
        model, tokens = ContextMap(8, 8, 2).to("cuda"), torch.randn(2, 12, 8).to("cuda")
        expected = sequential(model, tokens, 8)

        def widening(context, token, stream=True):
            context, stream = model(context, token, stream)
            return context.float(), stream.float()

        for step, kind in itertools.product((model, widening), (torch.float32, HALF[card])):
            with torch.autocast("cuda", HALF[card]):
                contexts, streams, stats = prefill(step, tokens.to(kind), 8, 1e-2, 12, piece=5)
            assert contexts.dtype == kind and all(stats.converged)
            for got, wanted in zip((contexts, streams), expected, strict=True):
                assert (got.float() - wanted).norm() < 0.05 * wanted.norm()


def test_evaluation_and_sweeps_wait_once_a_part():
    """Figures of one sweep come together."""
    with pretended_cuda(T4) as counts:
        model, tokens = ContextMap(8, 8, 1).to("cuda"), torch.randn(2, 6, 8).to("cuda")
        reference = sequential(model, tokens, 8)[0].detach()
        before = counts.waits
        errors, converged = cold_start(model, tokens, reference, 4)
    assert counts.waits - before == 4 == len(errors) == len(converged)


@pytest.mark.parametrize("card", [T4, A100], ids=["T4", "A100"])
def test_the_map_stays_in_the_compute_type(card):
    """From layer to layer nothing is widened: layer norms read and give the type that the products are in."""
    with pretended_cuda(card) as counts, torch.autocast("cuda", HALF[card]):
        model, half = ContextMap(8, 8, 3).to("cuda"), HALF[card]
        context, token = torch.randn(4, 8).to("cuda").to(half), torch.randn(4, 8).to("cuda").to(half)
        out = model(context, token)
        operations = ("native_layer_norm", "addmm", "cat", "add", "relu")
        kinds = {kind for name, kind in counts.types if name in operations}
    assert [part.dtype for part in out] == [half, half] and kinds == {half}


def test_weights_are_cast_once_for_all_steps_of_a_batch():
    """With gradient through 20 steps: one launch for all weights each way."""
    config = ResidualConfig(context_dim=8, embed_dim=8, num_layers=2)
    with pretended_cuda(T4) as counts:
        model = LanguageModel(config, 20).to("cuda")
        tokens = torch.randn(2, 20, 8).to("cuda").half()
        gradients = []
        for once in (True, False):
            model.zero_grad()
            before = counts.launched.copy()
            with torch.autocast("cuda", torch.float16):
                found = torch.cat(sequential(model.cast_step() if once else model.step, tokens, 8), -1)
            found.float().square().mean().backward()
            casts = (counts.launched - before)["_to_copy"]
            assert (casts < 5) == once
            trained = [weight for weight in model.context_map.parameters() if weight.grad is not None]
            gradients.append([weight.grad.cpu() for weight in trained])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=1e-3)


def test_the_covariance_is_multiplied_at_reduced_precision(monkeypatch):
    """Contexts come out of the map in half precision: their fp32 product may round its inputs to tf32."""
    products, factored = [], []
    multiply, factor = torch.Tensor.__matmul__, torch.linalg.cholesky_ex

    def noted(into, own):
        def call(*given, **options):
            into.append((given[0].dtype, torch.backends.cuda.matmul.fp32_precision))
            return own(*given, **options)

        return call

    monkeypatch.setattr(torch.linalg, "cholesky_ex", noted(factored, factor))
    monkeypatch.setattr(torch.Tensor, "__matmul__", noted(products, multiply))
    with pretended_cuda(A100), torch.autocast("cuda", torch.bfloat16):
        contexts = torch.randn(4, 16, 8).to("cuda").bfloat16().requires_grad_()
        phase1_loss(contexts, torch.zeros_like(contexts), 0.5, "logdet", 0.05)[0].backward()
    assert [precision for _, precision in products] == ["tf32", "tf32"]
    assert len(factored) == 1 and factored[0][0] == torch.float32 and factored[0][1] != "tf32"


def test_a_small_gradient_of_the_spread_reaches_fp16_contexts():
    """A gradient of 1e-8 is nothing in fp16; scaled before it is rounded, it is whole."""
    contexts = torch.randn(4000, 24, generator=torch.Generator().manual_seed(0)) * 1.1
    found = {}
    for kind in (torch.float32, torch.float16):
        leaf = contexts.clone().to(kind).requires_grad_()
        loss, _ = phase1_loss(leaf[None], leaf[None].detach(), 1.0, "logdet", 0.05)
        (loss * 2.0**16).backward()
        found[kind] = leaf.grad.float()
    assert (found[torch.float16] - found[torch.float32]).norm() < 0.02 * found[torch.float32].norm()


def test_processes_sum_what_lies_on_their_devices():
    """NCCL sums no tensor of the host: one that comes from there goes to the device and back."""

    def reduce(tensor, reduction):
        if not tensor.is_cuda:
            raise RuntimeError("No backend type associated with device type cpu")
        return 2 * tensor

    with pretended_cuda(T4):
        two = dict(num_processes=2, process_index=0, is_main_process=True, device=DEVICE, reduce=reduce)
        group = Group(SimpleNamespace(**two))
        host = group.total(torch.tensor([1, 2]))
        assert host.tolist() == [2, 4] and not host.is_cuda
        assert group.total(torch.ones(2).to(DEVICE)).is_cuda and group.totals(1.5, 2) == [3.0, 4.0]
        digests = group.assemble(torch.tensor([7, 8]), torch.tensor([0, 2]), 3)
        assert digests.tolist() == [14, 0, 16] and not digests.is_cuda
        whole = group.assemble(torch.ones(1, 2).half().to(DEVICE), torch.tensor([1]), 2)
        assert whole.cpu().tolist() == [[0, 0], [2, 2]] and whole.dtype == torch.float16


def test_the_pretended_device_refuses_what_cuda_refuses():
    """Else all of the above would show nothing."""
    with pretended_cuda(T4) as counts:
        x, w = torch.randn(3, 4).to("cuda"), torch.randn(4, 4, device="cuda").requires_grad_()
        with torch.autocast("cuda", torch.float16):
            product = x @ w
            normed = torch.nn.functional.layer_norm(product, (4,))
        assert (product.dtype, normed.dtype) == (torch.float16, torch.float32) and product.is_cuda
        (normed.sum() + product.float().sum()).backward()
        assert isinstance(w.grad, OnDevice) and w.grad.values.abs().sum() > 0
        refused = {
            "sum of two devices": lambda: x + torch.ones(3, 4),
            "host indexed by device": lambda: torch.ones(3)[torch.tensor([0], device="cuda")],
            "joined": lambda: torch.cat([x, torch.ones(1, 4)]),
            "as an array": lambda: x.numpy(),
            "generator": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            "chosen by a host mask": lambda: torch.where(torch.ones(3, 1, dtype=torch.bool), x, x),
            "product": lambda: torch.ones(4, 3) @ x,
            "norm of two types": lambda: torch.nn.functional.layer_norm(x.half(), (4,), w[0]),
            "written in another type": lambda: x.index_put_((x[:1, 0].long(),), x[:1].half()),
        }
        for name, wrong in refused.items():
            with pytest.raises((Refused, TypeError, RuntimeError)):
                wrong()
                pytest.fail(f"not refused: {name}")
        assert (x + torch.tensor(1.0)).is_cuda and x[torch.tensor([0, 1])].is_cuda
        assert x.tolist() == x.cpu().tolist()
        actions = {1: lambda: x.sum().item(), 0: lambda: x.sum() * 2, 2: lambda: (x[x > 0], x.cpu())}
        for waiting, action in actions.items():
            before = counts.waits
            action()
            assert counts.waits - before == waiting
        assert counts.launched["mm"] and copy.deepcopy(w).requires_grad


def test_the_tests_for_a_gpu():
    """They run, and hold where no device's own rounding is meant; a replay is one launch for all steps."""
    with pretended_cuda(A100):
        gpu.test_the_precision_is_what_the_card_computes_in()
    with pretended_cuda(T4) as counts:
        gpu.test_the_precision_is_what_the_card_computes_in()
        gpu.test_the_graph_gives_the_bits_of_the_loop()
        gpu.test_what_cannot_be_captured_is_done_step_by_step()
        gpu.test_sweeps_reach_the_loops_contexts()
        net = gpu.network()
        with torch.no_grad(), net.runtime.autocast():
            for launches in (1000, 6):
                before = counts.launches
                net.step.trajectory(net.tokens, net.start)
                assert counts.launches - before < launches


def test_the_figures_of_a_gpu(settings):
    """What `-m gpu` prints of a run of 100,000 tokens, of a tiny one."""
    with pretended_cuda(A100):
        lines = gpu.figures(ResidualConfig(**settings), [20])
    assert sum("of the matrix rate" in line for line in lines) == 2
    assert len(lines) in (5, 6)  # the loop, which is exact, has one row for both tolerances
