"""The command measures what it says: the loop's contexts and those of sweeps, of the weights it names, and
writes nothing else."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.fixed_point import solver
from newllm.fixed_point.solver import sequential
from newllm.flags import parse_args
from newllm.models.network import LanguageModel
from newllm.training.runtime import open_runtime
from scripts import prefill

LENGTHS = [20, 50]


def options(**changes):
    return SimpleNamespace(
        **dict(lengths=LENGTHS, tolerance=[1e-2, 1e-4], trained=False, plot=None) | changes
    )


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """So short that sequences have several."""
    monkeypatch.setattr(prefill, "PIECE", 16)
    monkeypatch.setattr(prefill, "LOOP_PIECE", 16)
    monkeypatch.setattr(prefill, "MAX_SWEEPS", 10**6)
    monkeypatch.setattr(solver, "SHORTEST_TRIAL", 8)
    monkeypatch.setattr(prefill, "read_text", slow_loop)


def slow_loop(*arguments):
    """What is chosen is no matter of this machine's speed: the loop is said to take long."""
    *others, _, clock, piece = arguments
    return solver.read_text(*others, 1e9, clock, piece)


def stream(length=40, precision="fp32"):
    """A tiny untrained network on random ids."""
    config = ResidualConfig(context_dim=16, embed_dim=16, num_layers=1, device="cpu", precision=precision)
    ids = torch.randint(300, (length,), generator=torch.Generator().manual_seed(0))
    return prefill.Stream(LanguageModel(config, 300), ids, open_runtime(config))


@torch.no_grad()
def test_the_loop_is_the_reference_with_a_time_for_every_length():
    """In pieces that go on from each other, whatever the lengths are; what comes later has taken longer."""
    long = stream()
    contexts, seconds = long.loop([5, 20, 40], "loop")
    assert torch.equal(contexts, sequential(long.step.contexts, long.embeddings, 16)[0])
    assert 0 < seconds[5] < seconds[20] < seconds[40]


@pytest.mark.parametrize(
    ("precision", "tolerance", "stages"),
    [("fp32", 1e-5, ["fp32"]), ("bf16", 1e-2, ["bf16"]), ("bf16", 1e-5, ["bf16", "fp32"])],
)
@torch.no_grad()
def test_sweeps_reach_the_tolerance_in_as_low_a_precision_as_it_allows(precision, tolerance, stages):
    """A tolerance below the rounding of bf16 is finished in fp32, from where bf16 came to."""
    long = stream(precision=precision)
    contexts, choice, work, seconds = long.read(40, tolerance, -2.0, 1.0)
    expected, _ = sequential(long.step.contexts, long.embeddings, 16)
    assert list(work) == stages and choice.by_sweeps and seconds > 0 and contexts.dtype == torch.float32
    assert (contexts - expected).norm() / expected.norm() < 5 * tolerance
    assert all(0 < done["passes"] <= done["sweeps"] <= 16 for done in work.values())


@pytest.mark.parametrize("late", [False, True], ids=["at once", "in the trial"])
def test_where_sweeps_lose_the_loop_reads_and_a_row_says_so(late, monkeypatch):
    """At once where the exponent is no good, and after a lost trial; exact, one row a length, and why."""
    monkeypatch.setattr(prefill, "read_text", solver.read_text)
    monkeypatch.setattr(solver, "MARGIN", 1e9)
    monkeypatch.setattr(prefill.Stream, "exponent", lambda self, contexts: -0.5 if late else 0.01)
    said = []
    long = stream(precision="bf16", length=50)
    rows, _, exponent = prefill.measure(long, "untrained", LENGTHS, [1e-2, 1e-4], said.append)
    assert [row["tokens"] for row in rows] == LENGTHS and exponent == (-0.5 if late else 0.01)
    for row, line in zip(rows, said, strict=True):
        assert not row["by_sweeps"] and row["error"] < 1e-5 and row["speed_up"] > 0
        assert list(row["work"]) == (["bf16"] if late else []) and prefill.shown(row)[3] == "loop"
        assert line.startswith(f"untrained, {row['tokens']} tokens to 0.01: by the loop (Lyapunov exponent ")
        assert ("are slower" in line) is late and ("do not converge" in line) is not late


def test_trained_and_untrained_weights_are_measured_and_the_run_is_left_alone(
    tiny_settings, tmp_path, capsys
):
    """Rows of both for each length and tolerance, and a picture; --trained leaves one out.

    Beside a run of other settings, untrained rows are there, or a sentence for --trained.
    """
    config, said = ResidualConfig(**tiny_settings | dict(untrained_control=False)), []
    train.main(config)
    other = ResidualConfig(**tiny_settings | {"num_samples": 10})
    found = prefill.report(other, options(), said.append)
    assert {row["weights"] for row in found["rows"]} == {"untrained"}
    assert "holds no trained weights" in said[-1] and any("by sweeps" in line for line in said)
    reason = r"checkpoints holds no trained weights of these settings: .*num_samples 12 -> 10"
    with pytest.raises(UserError, match=reason):
        prefill.report(other, options(trained=True), said.append)

    folder = tmp_path / "checkpoints"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    capsys.readouterr()
    prefill.main(config, options(trained=True))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sequence: 450 ids of dialogues") for line in lines)  # 12 + 6 samples of 25
    assert any(line.startswith("trained: continuing run ") for line in lines)
    assert any(
        line.startswith("trained, 50 tokens to 0.01: by sweeps (Lyapunov exponent -") for line in lines
    )
    assert not any(line.startswith("untrained ") for line in lines)
    picture = lines[-1].removeprefix("plot: ")
    assert (tmp_path / picture).exists() and "outputs/plots/prefill_" in picture

    found = prefill.report(config, options(), said.append)
    keys = [(row["weights"], row["tokens"], row["tolerance"]) for row in found["rows"]]
    assert keys == [(w, n, t) for w in ("untrained", "trained") for n in LENGTHS for t in (1e-2, 1e-4)]
    for row in found["rows"]:
        assert row["by_sweeps"] and row["error"] < 5 * row["tolerance"]
        assert row["speed_up"] == pytest.approx(row["loop_seconds"] / row["seconds"])
    assert found["curves"]["trained"] != found["curves"]["untrained"]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_failing_compiler_costs_a_line(tiny_settings, monkeypatch):
    """At the first use or at a later shape: the same contexts as without it, and no traceback."""
    config = ResidualConfig(**tiny_settings)
    expected = prefill.report(config, options(), lambda _: None)["rows"]
    for calls in (0, 30):
        left, said = [None] * calls, []

        def compiled(function, left=left, **_):
            def step(*inputs, **options):
                if not left:
                    raise RuntimeError("backend failed")
                left.pop()
                return function(*inputs, **options)

            return step

        monkeypatch.setattr(torch, "compile", compiled)
        rows = prefill.report(replace(config, compile=True), options(), said.append)["rows"]
        [line] = [line for line in said if "torch.compile failed" in line]
        assert "at the untrained network (RuntimeError: backend failed); going on without it" in line
        assert [row["error"] for row in rows] == [row["error"] for row in expected]


def test_a_sequence_longer_than_the_data_repeats_it_and_says_so():
    """Training ids, then validation ids, then all again."""
    train, val = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])
    ids, line = prefill.one_sequence(SimpleNamespace(train=train, val=val, source="somewhere"), 15)
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 1, 2, 3] and "repeated 2.5 times" in line


def test_bad_input_is_a_sentence(tiny_settings):
    """A baseline has nothing to sweep; lengths ascend, the loosest tolerance is first, else a sentence."""
    with pytest.raises(UserError, match="'gru' has no context to sweep"):
        prefill.report(ResidualConfig(**tiny_settings | {"model_type": "gru"}), options(), print)

    def parsed(*argv):
        return parse_args(ResidualConfig, argv, extra=prefill.flags)[1]

    given = parsed("--lengths", "10_000,100", "--tolerance", "1e-4,0.01")
    assert (given.lengths, given.tolerance) == ([100, 10000], [0.01, 1e-4])
    assert parsed().lengths == [1000, 10000, 100000] and parsed().tolerance == [1e-2, 1e-3, 1e-4]
    for argv in ("--tolerance=0", "--tolerance=nan"):
        with pytest.raises(UserError, match="--tolerance takes numbers from 1e-06 on"):
            parsed(argv)
