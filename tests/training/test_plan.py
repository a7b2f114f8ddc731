"""What a run will do is what it then does; settings without effect have none, and those given are named."""

import dataclasses

import pytest

import train
from config import ResidualConfig
from newllm import evaluate
from newllm.config import Config, settings_of
from newllm.report.record import find_records, read_record
from newllm.report.summary import cadence
from newllm.training import loop
from newllm.training.plan import training_samples, unused_lines, without_effect
from scripts import doctor

SETTINGS = {
    "fine-tuned": {},
    "untied, frozen": dict(tie_weights=False, freeze_context=True),
    "no Phase 1, no control": dict(phase1_max_iterations=0, untrained_control=False),
    "Phase 1 alone": dict(phase="1"),
    "small batches, frozen": dict(
        min_batches=5, phase1_batch_size=24, phase2_batch_size=7, freeze_context=True
    ),
    "adapter": dict(context_adapter="lora", adapter_rank=2),
    "transformer": dict(model_type="transformer"),
    "window": dict(model_type="window"),
    "tuning": dict(tune_share=0.3),
}


@pytest.fixture(autouse=True)
def short_figures(monkeypatch):
    """What contexts are like is of no matter here."""
    monkeypatch.setattr(evaluate, "MAX_SWEEPS", 12)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_is_what_trains(tiny_settings, monkeypatch, capsys, name):
    """Against what the optimizers got and how many steps they took; banner and doctor say the same."""
    if name == "adapter":
        pytest.importorskip("peft")
    trained, real = [], loop.make_optimizer

    def make(parts, *arguments):
        counted = [sum(p.numel() for ps, _ in parts for p in ps), 0]

        def count(*_):
            counted[1] += 1

        trained.append(counted)
        optimizer = real(parts, *arguments)
        optimizer.register_step_post_hook(count)
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", make)
    config = ResidualConfig(**tiny_settings | dict(phase2_epochs=2, phase1_max_iterations=2) | SETTINGS[name])
    train.main(config)
    out = capsys.readouterr().out
    (path,) = find_records(config.checkpoint_dir)
    plan = read_record(path).start["plan"]
    if not config.phase1_max_iterations:
        trained = [counted for counted in trained if counted[1]]  # Phase 1 opens and has nothing to do
    assert [[stage["trainable"], stage["passes"] * stage["batches"]] for stage in plan.values()] == trained
    for stage, title in (("phase1", "Phase 1"), ("phase2", "Phase 2")):
        said = f"{plan[stage]['trainable']:,} in {title}" if stage in plan else ""
        assert said in out and (stage in plan or f" in {title} (" not in out)
    assert ("attention: none" in out) == (config.model_type != "transformer")
    if name.startswith("small batches"):
        asked = "5 a pass; 24 asked for, min_batches makes them smaller"
        assert (
            f"batches: 3 samples in Phase 1 ({asked}), 3 samples in Phase 2 (5 a pass; 7 asked for, " in out
        )
        (batches,) = (line for line in out.splitlines() if line.startswith("batches: "))
        said = doctor.check_in_effect(config)
        assert batches.partition("; checkpoint")[0] in said


def test_the_banner_says_the_cadence(tiny_settings):
    """Batches and minutes; nothing where nothing is saved."""
    for changes, said in (
        ({}, "checkpoint every 2 batches, or 10 minutes"),
        (dict(save_min_seconds=30.0), "checkpoint every 2 batches, 30 s apart at least, or 10 minutes"),
        (dict(save_every_minutes=0.0), "checkpoint every 2 batches"),
        (dict(save_checkpoint=False), "no checkpoints"),
    ):
        assert cadence(ResidualConfig(**tiny_settings | changes)) == said


# Nothing that another setting says takes their effect away.
ALWAYS = {
    "preset", "data_source", "data_split", "data_column", "tokenizer", "max_seq_length", "num_tokens",
    "tune_share", "fit_share", "cache_dir", "model_type", "embed_dim", "tie_weights", "embeddings", "phase",
    "grad_clip", "min_batches", "device", "precision", "seed", "save_checkpoint", "load_checkpoint",
    "checkpoint_dir", "max_minutes", "artifacts", "trackers",
}  # fmt: skip

# Another value of each other setting.
OTHER = dict(
    vocab_size=290, val_samples=5, context_dim=20, num_layers=2, token_layers=3, init_scale=2.0,
    phase1_max_iterations=2, phase1_shuffle=True, phase1_convergence_threshold=0.5,
    phase1_min_converged_ratio=0.1, phase1_learning_rate=0.1, phase1_batch_size=8,
    dist_reg="covariance", dist_reg_weight=0.9, context_noise=0.5, phase2_epochs=3,
    phase2_learning_rate=0.03, phase2_batch_size=9, untrained_control=True, freeze_context=True,
    whiten_context=True, context_lr_scale=3.0, context_adapter="lora", adapter_rank=2,
    gradient_sweeps=1, dropout=0.7, token_dropout=0.6, warmup_ratio=0.7, patience=1, val_quick_frac=0.9,
    val_quick_every_n_batches=7, weight_decay=5.0, label_smoothing=0.4, teachers="a.pth",
    context_memory_mb=1, compile=True,
    attention="math",
    gpu_memory_fraction=0.3, save_every_n_batches=1, save_min_seconds=1.5, save_every_minutes=0.001,
    keep_last=5, backup_dir="BACKUP", backup_every_minutes=0.001,
    retrieval="ngram,cache", retrieval_keys="tokens", retrieval_window=5,
)  # fmt: skip

SMALL = dict(min_batches=10, dist_reg_weight=0.0, tune_share=0.25, val_quick_every_n_batches=0)
CASES = {
    "small budget and others": SMALL | dict(save_checkpoint=True),
    "frozen, no layer of the head": dict(freeze_context=True, token_layers=0),
    "frozen, untrained": dict(freeze_context=True, phase1_max_iterations=0),
    "one batch": dict(num_samples=1, min_batches=1),
    "Phase 1": dict(phase="1"),
    "Phase 1 and the control": dict(phase="1", untrained_control=True),
    "gru": dict(model_type="gru"),
    "transformer": dict(model_type="transformer"),
    "window": dict(model_type="window"),
    "token": dict(model_type="token", token_layers=0),
    "whitened": dict(freeze_context=True, whiten_context=True, phase1_max_iterations=1),
    "hard targets": dict(label_smoothing=0.0),
    "counts alone": dict(model_type="gru", retrieval="ngram"),
    "Phase 1, looking up": dict(phase="1", retrieval="ngram,knn"),
}
# Not the same twice; "contexts" is a word, not a figure.
MEASURED = ("run_id", "date", "device", "seconds", "tok_per_s", "memory", "saving_share", "compile")


@pytest.fixture
def base(tiny_settings):
    """Settings of the smallest run, two epochs long, that saves nothing."""
    short = dict(untrained_control=False, save_checkpoint=False, phase2_epochs=2, max_seq_length=12)
    return tiny_settings | short


def figures(config):
    summary = train.main(config)
    measured = {name for name in summary if any(part in name for part in MEASURED)} | {"contexts"}
    return {name: value for name, value in summary.items() if name not in measured}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_to_have_no_effect_has_none(case, base, tmp_path):
    """A run in which all of these settings are others ends with the same figures."""
    config = ResidualConfig(**base | CASES[case])
    refused = {"context_adapter"}  # beside the others here
    if not config.freeze_context:
        refused.add("whiten_context")
    names = without_effect(config, on_cpu=True, tokenizer="bpe").keys() - refused
    other = {name: OTHER[name] for name in names}
    if "backup_dir" in other:
        other["backup_dir"] = str(tmp_path / "backup")
    changed = dataclasses.replace(config, **other, checkpoint_dir=str(tmp_path / "other"))
    assert all(getattr(config, name) != getattr(changed, name) for name in other)
    assert figures(config) == figures(changed)
    assert not (tmp_path / "backup").exists()


def test_every_setting_is_judged(base):
    """A setting is one that nothing takes the effect of, or there are others beside which it has none."""
    judged = set()
    for case in (dict(num_tokens=240, num_samples=3), *CASES.values()):
        judged |= set(without_effect(ResidualConfig(**base | case), on_cpu=True, tokenizer="gpt2"))
    assert not judged & ALWAYS
    assert judged | ALWAYS == set(settings_of(Config))
    assert judged - {"num_samples"} == set(OTHER)


FROZEN = dict(freeze_context=True, gradient_sweeps=4, token_dropout=0.1, context_lr_scale=2.0, dropout=0.1)
GRU = dict(model_type="gru", init_scale=3.0, phase1_max_iterations=9, dist_reg_weight=0.9, token_dropout=0.1)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(), ""),
        (
            dict(phase1_batch_size=6, phase2_batch_size=64, num_samples=30),
            "phase1_batch_size phase2_batch_size",
        ),
        (dict(phase1_batch_size=3, phase2_batch_size=2, num_samples=30), ""),
        (dict(num_samples=3, num_tokens=1280), "num_samples"),
        (dict(num_tokens=1280), ""),
        (dict(vocab_size=500, tokenizer="gpt2"), "vocab_size"),
        (dict(attention="math"), "attention"),
        (dict(attention="math", model_type="transformer"), ""),
        (dict(adapter_rank=4), "adapter_rank"),
        (dict(adapter_rank=4, context_adapter="lora"), ""),
        (dict(backup_every_minutes=1.0), "backup_every_minutes"),
        (dict(backup_every_minutes=1.0, backup_dir="x"), ""),
        (dict(gpu_memory_fraction=0.3), "gpu_memory_fraction"),
        (FROZEN, "gradient_sweeps token_dropout context_lr_scale"),
        (GRU, "init_scale phase1_max_iterations dist_reg_weight"),
        (dict(val_quick_frac=0.9, val_quick_every_n_batches=0), "val_quick_frac"),
        (dict(dist_reg="covariance", dist_reg_weight=0.0), "dist_reg"),
        (dict(context_noise=0.1, phase1_max_iterations=0), "context_noise"),
        (dict(keep_last=3, save_checkpoint=False), "keep_last"),
        (dict(phase="1", freeze_context=True, phase2_epochs=3), "freeze_context"),
        (dict(phase="1", untrained_control=False, phase2_epochs=3), "phase2_epochs"),
        (dict(retrieval="ngram,knn", retrieval_window=99), "retrieval_window"),
        (
            dict(retrieval="none", retrieval_window=99, retrieval_keys="tokens"),
            "retrieval_window retrieval_keys",
        ),
        (dict(retrieval="cache", retrieval_window=99, retrieval_keys="tokens"), ""),
    ],
    ids=str,
)
def test_those_given_are_named_in_a_line_each(given, named):
    """What was given and changes nothing, with its value and the reason; what was not given is no matter."""
    lines = unused_lines(ResidualConfig(**given), on_cpu=True, tokenizer=given.get("tokenizer", "bpe"))
    assert {line.split()[1] for line in lines} == set(named.split())
    for line in lines:
        name = line.split()[1]
        assert line.startswith(f"warning: {name} {given[name]} has no effect: ") and "\n" not in line


def test_what_differs_from_the_file_is_given():
    """dataclasses.replace gives every setting; the file's num_tokens counts more than num_samples."""
    copy = dataclasses.replace(ResidualConfig(), freeze_context=True, adapter_rank=4)
    assert [line.split()[1] for line in unused_lines(copy, True, "bpe")] == ["adapter_rank"]

    class Budgeted(ResidualConfig):
        num_tokens = 1280

    assert [line.split()[1] for line in unused_lines(Budgeted(num_samples=3), True, "bpe")] == ["num_samples"]
    assert Budgeted(num_samples=3).num_samples == 10


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5), (0.5, 0.3)])
def test_a_run_says_it_at_its_start_and_records_it(tiny_settings, tmp_path, capsys, shares):
    """Before anything is trained; the batches that it names are those that an epoch over the data has."""
    given = dict(phase1_batch_size=12, adapter_rank=4, untrained_control=False, phase="1")
    given |= dict(zip(("tune_share", "fit_share"), shares, strict=True))
    config = ResidualConfig(**tiny_settings | given)
    steps = train.main(config)["phase1_steps"]
    said = capsys.readouterr().out.split("== Phase 1")[0].splitlines()
    assert "warning: adapter_rank 4 has no effect: there is no adapter (context_adapter)" in said
    samples, batches = training_samples(config), steps // config.phase1_max_iterations
    assert samples == len(train.load_data(config).train)
    line = "warning: phase1_batch_size 12 has no effect: min_batches 3 makes batches of "
    assert f"{line}{-(-samples // batches)} of {samples} samples" in said
    [record] = tmp_path.glob("checkpoints/*/logs/metrics_*.jsonl")
    assert line in record.read_text()
