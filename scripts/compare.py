"""The evidence: every arm at every seed and budget, then tables, pictures and verdicts.

    python3 -m scripts.compare --data_source dialogues.jsonl --seeds 5 --tokens 6400,25000,100000
    python3 -m scripts.compare --arms phase1_frozen,gru --seeds 3  # other settings are flags, as in train.py
    python3 -m scripts.compare --tune --tokens 25000  # rate, dropout, weight decay: on training samples
    python3 -m scripts.compare --report  # tables and pictures from the rows that are there

Each run leaves one row in `results/results.jsonl`, from which the tables are made, and with `--keep` what
train.py leaves (model, pictures, page, summary) in `checkpoint_dir/RUN`: scripts.report and scripts.export
take that folder by --checkpoint_dir. A run is done when its row is there: cut off and started again, also
with more arms, seeds or budgets, it makes what is missing, and a run in hand goes on from its own
checkpoint. Several of these may share `results/` at a time, each with arms and a checkpoint_dir of its own.
"""

import dataclasses
import itertools
import os
from pathlib import Path

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.config import EARLIER, Range, expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import flag, parse_args
from newllm.report import compare as tables
from newllm.report.compare import Comparison, append_row, read_results
from newllm.report.pictures import comparison_points, context_curves
from newllm.report.series import make_series, whole_numbers
from newllm.saving.files import usable_folder, write_text
from newllm.saving.runs import shaping
from newllm.saving.stop import Interrupt

UNTRAINED = dict(phase1_max_iterations=0)
FROZEN = dict(freeze_context=True)
ARMS = {  # name: what it is, and the settings in which it differs from those of the command
    "token": ("the current token alone", dict(model_type="token")),
    "window": ("a window: eight tokens and slow averages of all", dict(model_type="window")),
    "window_whitened": ("the same window, whitened", dict(model_type="window", whiten_context=True)),
    "untrained_frozen": ("untrained contexts, frozen", UNTRAINED | FROZEN),
    "untrained_whitened": ("the same, whitened", UNTRAINED | FROZEN | dict(whiten_context=True)),
    "phase1_frozen": ("Phase 1, frozen", FROZEN),
    "phase1_shuffled": ("Phase 1 on shuffled tokens, frozen", FROZEN | dict(phase1_shuffle=True)),
    "phase1_w0": ("Phase 1 without its regularizer, frozen", FROZEN | dict(dist_reg_weight=0.0)),
    "phase1_w0.1": ("Phase 1 at regularizer weight 0.1, frozen", FROZEN | dict(dist_reg_weight=0.1)),
    "phase1_w0.5": ("Phase 1 at regularizer weight 0.5, frozen", FROZEN | dict(dist_reg_weight=0.5)),
    "phase1_w0.9": ("Phase 1 at regularizer weight 0.9, frozen", FROZEN | dict(dist_reg_weight=0.9)),
    "phase1_w1": ("Phase 1 without consistency, frozen", FROZEN | dict(dist_reg_weight=1.0)),
    "phase1_finetuned": ("Phase 1 and fine-tuning", {}),
    "phase1_finetuned_gpt2": ("the same on GPT-2's tokens: compare bits per byte", dict(tokenizer="gpt2")),
    "end_to_end": ("the same network end to end, without Phase 1", UNTRAINED),
    "gru": ("GRU", dict(model_type="gru")),
    "lstm": ("LSTM", dict(model_type="lstm")),
    "transformer": ("Transformer (GPT-2's blocks)", dict(model_type="transformer")),
}
GRID = dict(  # of every arm
    phase2_learning_rate=(0.0005, 0.001, 0.002, 0.004),
    dropout=(0.0, 0.15, 0.3, 0.5),
    weight_decay=(0.1, 0.3, 1.0, 3.0, 10.0),
)
TUNING_START = (0.002, 0.3, 0.1)
DECAY_AHEAD = 1.0  # tried before what lies between: one step up from the least is less than seeds differ
TUNED_AS = {  # an ablation differs from its arm in one thing: it takes what that arm was tuned to
    **{arm: "phase1_frozen" for arm in ARMS if arm.startswith(("phase1_w", "phase1_shuffled"))},
    "phase1_finetuned_gpt2": "phase1_finetuned",
}
TUNE_SHARE, TUNE_SEED = 0.2, 1000  # neither the validation samples nor the seeds of the comparison
ROWS, TUNING_ROWS = "results.jsonl", "tuning.jsonl"
PROJECT = Path(__file__).resolve().parents[1]
MARK = "<!-- What follows is made by `python3 -m scripts.compare --report`. -->"


def plan(arms, seeds, budgets, tuned):
    """{name of a run: its arm, its settings} for all arms, seeds and numbers of samples."""
    runs = {}
    for samples, seed, arm in itertools.product(budgets, range(seeds), arms):
        chosen = settings_at(tuned.get((samples, TUNED_AS.get(arm, arm))))
        runs[f"{arm}-{samples}-{seed}"] = arm, dict(num_samples=samples, seed=seed) | ARMS[arm][1] | chosen
    return runs


def tune(config, arms, budgets, path):
    """Each arm's rate and dropout, then its weight decay from the best of these, on dialogues held back."""
    for samples, arm in itertools.product(budgets, [arm for arm in arms if arm not in TUNED_AS]):
        best = walk(config, samples, arm, path, (0, 1), {TUNING_START})
        walk(config, samples, arm, path, (2,), {best, (*best[:2], DECAY_AHEAD)})


def walk(config, samples, arm, path, axes, points):
    """Try points of the grid and, along some of its axes, what is next to the best until none is better.

    Rows that are there count as they stand, whatever settings there are by now that they do not know.

    Returns:
        The best of those that differ from the first along these axes alone.

    Raises:
        UserError: as of `make`.
    """
    split = dict(num_samples=samples, tune_share=TUNE_SHARE, seed=TUNE_SEED, retrieval="none")
    fixed = [axis for axis in range(len(GRID)) if axis not in axes]
    (aside,) = {tuple(point[axis] for axis in fixed) for point in points}

    def settings(point):
        return ARMS[arm][1] | split | dict(zip(GRID, point, strict=True))

    def known():
        rows = tried(read_results(path)).get((samples, arm), [])
        for row in rows:
            now = config_of(config, settings(place(row)))
            refuse_other(row, now, path, shaping(row["settings"], "retrieval"))
        places = [place(row) for row in rows]
        return [point for point in places if tuple(point[axis] for axis in fixed) == aside]

    while points:
        runs = {}
        for point in sorted(points - set(known())):
            runs["-".join([arm, str(samples), *map("{:g}".format, point)])] = arm, settings(point)
        make(config, runs, path)
        points = neighbours(known()[0], axes) - set(known())
    return known()[0]


def place(row):
    """The point of the grid at which a row was made; rows that name no weight decay are at the least."""
    return tuple((dict(weight_decay=GRID["weight_decay"][0]) | row["changes"])[name] for name in GRID)


def neighbours(point, axes):
    """Points of the grid at most one step away, along one of some axes."""
    near = set()
    for axis in axes:
        values = [*GRID.values()][axis]
        at = values.index(point[axis])
        near |= {(*point[:axis], value, *point[axis + 1 :]) for value in values[max(at - 1, 0) : at + 2]}
    return near


def tried(rows):
    """{(samples, arm): its rows of the grid, the best on the tuning split first}."""
    points = {}
    for row in sorted(rows, key=lambda row: row["val_loss"]):
        points.setdefault((row["changes"]["num_samples"], row["arm"]), []).append(row)
    return points


def settings_at(rows):
    """Settings at the best point of the grid; none where nothing was tried."""
    return dict(zip(GRID, place(rows[0]), strict=True)) if rows else {}


def make(config, runs, path, keep=False):
    """Train what is missing; each run adds its row to the file, which says what is done.

    Args:
        runs: {name: (arm, settings)}. path: of the file of rows.
        keep: whether runs leave their artefacts too, each in a folder of its own in checkpoint_dir.

    Raises:
        UserError: the file holds such a run with other settings, or a run failed.
        Stopped: a signal or max_minutes ended the comparison early.
    """
    folder = usable_folder(config.checkpoint_dir, "checkpoint_dir")
    configs = {
        name: config_of(config, changes, checkpoint_dir=str(folder / name), artifacts=keep)
        for name, (_, changes) in runs.items()
    }

    def done():
        rows = {row["run"]: row for row in read_results(path) if row["run"] in runs}
        for name, row in rows.items():
            refuse_other(row, configs[name], path)
        return rows

    def work(name):
        rows = done()
        if name in rows:  # in the meantime, by another process
            return rows[name]
        summary = call_apart(train.main, configs[name])
        arm, changes = runs[name]
        row = dict(run=name, arm=arm, seed=configs[name].seed, changes=changes) | summary
        row["val_sample_nats"] = [round(nats, 3) for nats in summary["val_sample_nats"]]
        row["settings"] = meaning(configs[name].to_dict())
        append_row(path, row)
        for checkpoint in (*(folder / name).glob("model_*.pt"), folder / name / "manifest.json"):
            checkpoint.unlink(missing_ok=True)
        return row

    with Interrupt(config.max_minutes):
        places = {name: {"size": run.num_samples, "folder": name} for name, run in configs.items()}
        make_series(folder, places, work, done())


def config_of(config, changes, **more):
    """The configuration of a run, which stands beside other runs and needs no control of its own."""
    own = dict(keep_last=0, backup_dir="", max_minutes=0.0, untrained_control=False)
    return dataclasses.replace(config, **own | more | changes)


def refuse_other(row, config, path, names=None):
    """Raise UserError where a row was made with other settings; names: those that count, or all."""
    before, now = meaning(EARLIER | row["settings"]), meaning(config.to_dict())
    if others := [key for key in before | now if before.get(key) != now.get(key) and key in (names or [key])]:
        raise UserError(
            f"{path}: {row['run']} was made with other settings ({', '.join(others)}): "
            "choose another --results."
        )


def meaning(settings):
    """The settings that shape a run's figures. The folder of its text and the machine do not."""
    return shaping(settings) | {"data_source": Path(settings["data_source"]).name}


def page_lines(comparison, tuning, pictures):
    """What the page shows of the rows: claims, arms by budget, each budget with pictures, tuned settings."""
    claims = tables.claims_table(comparison)
    lines = ["## Claims", "", *claims, ""] if claims else []
    labels = {arm: label for arm, (label, _) in ARMS.items()}
    lines += ["## Held-out perplexity", "", *tables.perplexity_table(comparison, labels), ""]
    for tokens in reversed(comparison.budgets):
        lines += [f"## {tokens:,} tokens", "", *tables.budget_table(comparison, tokens), ""]
        lines += [f"![arms at {tokens:,} tokens]({pictures}/comparison_{tokens}.png)", ""]
        lines += [f"![contexts at {tokens:,} tokens]({pictures}/contexts_{tokens}.png)", ""]
    return lines + (["## What each arm was tuned to", "", *tuning_table(tuning)] if tuning else [])


def tuning_table(rows):
    """Markdown: the best point of the grid for each number of samples and arm, and how many were tried."""
    lines = []
    for (samples, arm), made in sorted(tried(rows).items()):
        point = [f"{value:g}" for value in place(made[0])]
        lines.append([samples, arm, *point, f"{made[0]['val_ppl']:.1f}", len(made)])
    header = ["samples", "arm", *GRID, "perplexity on the tuning split", "points tried"]
    return tables.markdown(header, lines)


def report(results):
    """Make and print the tables, draw the pictures; the project's own page is docs/results.md."""
    rows = read_results(results / ROWS)
    if not rows:
        raise UserError(f"there are no results in {results}: run scripts.compare without --report first.")
    page = PROJECT / "docs" / "results.md" if results == PROJECT / "results" else results / "comparison.md"
    comparison = Comparison(rows)
    pictures = Path(os.path.relpath(results, page.parent)).as_posix()
    lines = page_lines(comparison, read_results(results / TUNING_ROWS), pictures)
    above = page.read_text(encoding="utf-8").partition(MARK)[0] if page.exists() else "# Results\n\n"
    write_text(page, "\n".join([above + MARK, "", *lines]) + "\n")
    for tokens in comparison.budgets:
        comparison_points(comparison, tokens, results / f"comparison_{tokens}.png")
        context_curves(comparison, tokens, results / f"contexts_{tokens}.png")
    print("\n".join([*lines, f"page: {page}"]))


def main(config, arguments):
    """Make what is missing, choose or report."""
    arms = list(ARMS) if arguments.arms == "all" else arguments.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"there is no arm '{unknown[0]}': choose from {', '.join(ARMS)}.")
    results = usable_folder(arguments.results, "results")
    budgets = [tokens // config.max_seq_length for tokens in arguments.tokens]
    if arguments.tune:
        tune(config, arms, budgets, results / TUNING_ROWS)
        print("\n".join(tuning_table(read_results(results / TUNING_ROWS))))
        return
    if not arguments.report:
        runs = plan(arms, arguments.seeds, budgets, tried(read_results(results / TUNING_ROWS)))
        make(config, runs, results / ROWS, arguments.keep)
    report(results)


def flags(parser):
    """The command's own flags."""
    add, tokens = parser.add_argument, whole_numbers("--tokens")
    add("--arms", default="all", help=f"comma-separated, of {', '.join(ARMS)}")
    add("--seeds", type=flag("seeds", int, Range(1)), default=5, help="seeds 0 ... N-1")
    add("--tokens", type=tokens, default=(100_000,), help="training tokens, comma-separated")
    add("--results", type=expanded, default="results", help="folder of the rows, pictures, page")
    add("--keep", action="store_true", help="keep models and pictures, in checkpoint_dir/RUN")
    add("--tune", action="store_true", help="choose each arm's rate, dropout and weight decay")
    add("--report", action="store_true", help="train nothing, make tables and pictures")


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags))
