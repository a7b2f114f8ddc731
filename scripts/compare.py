"""The evidence: every arm at every seed and budget, then one page of tables, pictures and verdicts.

    python3 -m scripts.compare --data_source dialogues.jsonl --seeds 5 --tokens 6400,25000,100000
    python3 -m scripts.compare --arms phase1_frozen,gru --seeds 3  # other settings are flags, as in train.py
    python3 -m scripts.compare --tune --tokens 25000  # rate, dropout, weight decay: on training samples
    python3 -m scripts.compare --report  # the page and its pictures from the rows that are there
    python3 -m scripts.compare --repeat gru-50-0 --data_source dialogues.jsonl  # again: the row's figures?

Each run leaves one row in `results/results.jsonl`, from which the page is made, and with `--keep` what
train.py leaves (model, pictures, page, summary) in `checkpoint_dir/RUN`: scripts.report and scripts.export
take that folder by --checkpoint_dir. A run is done when its row is there: cut off and started again, also
with more arms, seeds or budgets, it makes what is missing, and a run in hand goes on from its own
checkpoint. Arms that differ in what is looked up alone are trained once, in the folder of the arm that they
differ from. Several of these may share `results/` at a time, each with arms and a checkpoint_dir of its own.
"""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.config import EARLIER, Range, expanded
from newllm.errors import UserError, exit_on_user_error
from newllm.flags import flag, numbers, parse_args
from newllm.report.compare import Comparison, append_row, markdown, read_results, table
from newllm.report.evidence import END_TO_END, FINETUNED, page_lines
from newllm.report.pictures import context_curves, perplexities, predictability
from newllm.report.series import make_series
from newllm.report.summary import CURVES
from newllm.saving.files import usable_folder, write_text
from newllm.saving.runs import MANIFEST, RUNS, shaping
from newllm.saving.stop import Interrupt
from newllm.saving.teachers import identified

UNTRAINED = dict(phase1_max_iterations=0)
FROZEN = dict(freeze_context=True)
ARMS = {  # name: what it is, and the settings in which it differs from those of the command
    "window": ("a window: eight tokens and slow averages of all", dict(model_type="window")),
    "untrained_frozen": ("untrained contexts, frozen", UNTRAINED | FROZEN),
    "phase1_frozen": ("Phase 1, frozen", FROZEN),
    "phase1_shuffled": ("Phase 1 on shuffled tokens, frozen", FROZEN | dict(phase1_shuffle=True)),
    "phase1_w0": ("Phase 1 without its regularizer, frozen", FROZEN | dict(dist_reg_weight=0.0)),
    "phase1_w1": ("Phase 1 without consistency, frozen", FROZEN | dict(dist_reg_weight=1.0)),
    FINETUNED: ("Phase 1 and fine-tuning", {}),
    END_TO_END: ("our network trained end to end, without Phase 1", UNTRAINED),
    "gru": ("GRU", dict(model_type="gru")),
    "lstm": ("LSTM", dict(model_type="lstm")),
    "transformer": ("Transformer (GPT-2's blocks)", dict(model_type="transformer")),
}
LOOKED_UP = {  # of each of two arms, with its own name before
    "by_hidden": ("places compared by the head's output", dict(retrieval_keys="hidden")),
    "by_contexts": ("places compared by contexts", dict(retrieval_keys="contexts")),
    "by_tokens": ("places compared by last tokens", dict(retrieval_keys="tokens")),
    "by_hidden_tokens": ("by head's output and tokens", dict(retrieval_keys="hidden,tokens")),
    "by_hidden_contexts": ("by head's output and contexts", dict(retrieval_keys="hidden,contexts")),
    "by_contexts_tokens": ("by contexts and tokens", dict(retrieval_keys="contexts,tokens")),
    "by_all": ("by all three", dict(retrieval_keys="hidden,contexts,tokens")),
    "with_cache": ("looks up the text so far alone", dict(retrieval="cache")),
    "with_knn": ("looks up the training text alone", dict(retrieval="knn")),
}
VARIANTS = {}  # arm: the one it is trained as, once for both
for (name, (words, changes)), arm in itertools.product(LOOKED_UP.items(), (END_TO_END, FINETUNED)):
    if changes.get("retrieval_keys") != ResidualConfig.retrieval_keys:  # which is the arm itself
        ARMS[f"{arm}_{name}"] = words, ARMS[arm][1] | changes
        VARIANTS[f"{arm}_{name}"] = arm
GRID = dict(  # of every arm
    phase2_learning_rate=(0.00025, 0.0005, 0.001, 0.002, 0.004),
    dropout=(0.0, 0.15, 0.3, 0.5),
    weight_decay=(0.1, 1.0, 3.0),
)
TUNING_START = (0.001, 0.0, 3.0)
TUNED_AS = VARIANTS | {  # an ablation differs from its arm in one thing: it takes what that arm was tuned to
    arm: "phase1_frozen" for arm in ("phase1_shuffled", "phase1_w0", "phase1_w1")
}
TUNE_SHARE, TUNE_SEED = 0.2, 1000  # neither the validation samples nor the seeds of the comparison
ROWS, TUNING_ROWS = "results.jsonl", "tuning.jsonl"
SINGLE = "single_runs.md"  # written by hand, the end of the page
REPEATED = "val_ppl", "val_ppl_retrieval", "val_ppl_retrieval_counting", "val_ppl_kn"
PICTURES = {
    "results": "perplexity against training tokens",
    "contexts": "what the contexts are like",
    "sweeps": "sweeps needed against the Lyapunov exponent, a point each network",
}
UNTRAINED_CURVES = {f"{name}_untrained" for name in CURVES}
PROJECT = Path(__file__).resolve().parents[1]


def plan(arms, seeds, budgets, tuned):
    """{name of a run: its arm, its settings}; arms that are trained once stand one after the other."""
    trained = dict.fromkeys(VARIANTS.get(arm, arm) for arm in arms)
    ordered = [arm for one in trained for arm in arms if VARIANTS.get(arm, arm) == one]
    runs = {}
    for samples, seed, arm in itertools.product(budgets, range(seeds), ordered):
        settings = dict(num_samples=samples, seed=seed) | ARMS[arm][1]
        settings |= tuned_to(tuned, samples, TUNED_AS.get(arm, arm))
        runs[f"{arm}-{samples}-{seed}"] = arm, settings
    return runs


def tuned_to(tuned, samples, arm):
    """The settings that were best for an arm: at this budget, or at the nearest smaller one; {} of none."""
    budgets = [budget for budget, of in tuned if of == arm and budget <= samples]
    return dict(zip(GRID, place(tuned[max(budgets), arm][0]), strict=True)) if budgets else {}


def tune(config, arms, budgets, path):
    """Walk each arm's grid from TUNING_START until no neighbour is better on dialogues held back."""
    for samples, arm in itertools.product(budgets, [arm for arm in arms if arm not in TUNED_AS]):
        split = dict(num_samples=samples, tune_share=TUNE_SHARE, seed=TUNE_SEED, retrieval="none")
        points = {TUNING_START}
        while points:
            runs = {}
            for point in sorted(points):
                name = "-".join([arm, str(samples), *map("{:g}".format, point)])
                runs[name] = arm, ARMS[arm][1] | split | dict(zip(GRID, point, strict=True))
            make(config, runs, path)
            made = tried(read_results(path))[samples, arm]
            points = neighbours(place(made[0])) - {place(row) for row in made}


def place(row):
    """The point of the grid at which a row was made."""
    return tuple((row["settings"] | row["changes"])[name] for name in GRID)


def neighbours(point):
    """Points of the grid at most one step away, along one axis."""
    near = set()
    for axis, values in enumerate(GRID.values()):
        at = values.index(point[axis])
        near |= {(*point[:axis], value, *point[axis + 1 :]) for value in values[max(at - 1, 0) : at + 2]}
    return near


def tried(rows):
    """{(samples, arm): its rows of the grid, the best on the tuning split first}."""
    points = {}
    for row in sorted(rows, key=lambda row: row["val_loss"]):
        points.setdefault((row["changes"]["num_samples"], row["arm"]), []).append(row)
    return points


def make(config, runs, path, keep=False):
    """Train what is missing of the runs {name: (arm, settings)}; each adds its row to the file at path.

    The file says what is done. keep: runs leave their artefacts too, in a folder in checkpoint_dir. UserError
    where the file holds such a run with other settings, or a run failed.
    """
    folder = usable_folder(config.checkpoint_dir, "checkpoint_dir")
    homes, configs = {}, {}
    for name, (arm, changes) in runs.items():
        homes[name] = VARIANTS.get(arm, arm) + name.removeprefix(arm)
        own = dict(checkpoint_dir=str(folder / homes[name]), artifacts=keep)
        configs[name] = config_of(config, changes, **own)

    def done():
        rows = {row["run"]: row for row in read_results(path) if row["run"] in runs}
        for name, row in rows.items():
            refuse_other(row, configs[name], path)
        return rows

    def clear_if_done(home):
        if {name for name in runs if homes[name] == home} <= done().keys():
            clear(folder / home)

    def work(name):
        if name not in done():  # nor made in the meantime by another process
            summary = call_apart(train.main, configs[name])
            arm, changes = runs[name]
            row = dict(run=name, arm=arm, seed=configs[name].seed, changes=changes)
            append_row(path, row | figures(summary) | dict(settings=meaning(configs[name].to_dict())))
        clear_if_done(homes[name])
        return done()[name]

    for home in dict.fromkeys(homes.values()):
        clear_if_done(home)  # what was cut off after its last row
    with Interrupt(config.max_minutes):
        places = {name: {"size": run.num_samples, "folder": homes[name]} for name, run in configs.items()}
        make_series(folder, places, work, done())


def figures(summary):
    """What a row keeps of a summary: nats to a thousandth, no curves of untrained contexts."""
    kept = {key: value for key, value in summary.items() if key not in UNTRAINED_CURVES}
    long = {key: value for key, value in kept.items() if key.startswith("val_sample_nats") and value}
    return kept | {key: [round(nats, 3) for nats in value] for key, value in long.items()}


def clear(folder):
    """Delete the checkpoints of a folder whose runs have their rows; records and artefacts stay."""
    shutil.rmtree(folder / RUNS, ignore_errors=True)
    for path in (*folder.glob("model_*.pt"), folder / MANIFEST):
        path.unlink(missing_ok=True)


def repeat(config, name, path):
    """Make a run again by the settings of its row; say its figures beside the row's, and whether they agree.

    UserError where there is no such row, text or teachers are others, or figures differ on the same device.
    """
    row = next((row for row in read_results(path) if row["run"] == name), None)
    if row is None:
        raise UserError(f"{path} has no row of a run {name}: --repeat takes one of its names.")
    own, now = EARLIER | row["settings"], meaning(config.to_dict())
    for key in ("data_source", "teachers"):  # of which a row has the names alone
        if own[key] != now[key]:
            raise UserError(f"{name} was made with {key} '{own[key]}', not '{now[key]}': give it by --{key}.")
        own[key] = getattr(config, key)
    folder = usable_folder(config.checkpoint_dir, "checkpoint_dir") / f"repeated-{name}"
    with Interrupt(config.max_minutes):
        made = call_apart(train.main, config_of(config, own, checkpoint_dir=str(folder), artifacts=False))
    clear(folder)
    lines = []
    for key in (key for key in REPEATED if key in row):
        gap = "none" if made[key] == row[key] else f"{made[key] / row[key] - 1:+.2e}"
        lines.append([key, row[key], made[key], gap])
    lines += [[key, row.get(key), made[key], ""] for key in ("device", "commit")]
    print(*table(["figure", "row", "again", "difference"], lines), sep="\n")
    if all(line[-1] in ("none", "") for line in lines):
        print(f"{name}: the figures agree to the bit")
    elif row.get("device") == made["device"]:
        raise UserError(f"{name} has other figures than its row, on such a device: mend what changed them.")
    else:
        print(f"{name}: the figures differ, and so do the devices")


def config_of(config, changes, **more):
    """The configuration of a run, which stands beside other runs and needs no control of its own."""
    own = dict(keep_last=0, backup_dir="", max_minutes=0.0, untrained_control=False)
    return dataclasses.replace(config, **own | more | changes)


def refuse_other(row, config, path):
    """Raise UserError where a row was made with other settings."""
    before, now = meaning(EARLIER | row["settings"]), meaning(config.to_dict())
    if others := [key for key in before | now if before.get(key) != now.get(key)]:
        reason = f"{row['run']} was made with other settings ({', '.join(others)})"
        raise UserError(f"{path}: {reason}: choose another --results.")


def meaning(settings):
    """The settings that shape a run's figures: not the folders of its text and teachers, nor the machine."""
    files = {name: settings[name].split(",") for name in ("data_source", "teachers")}
    return shaping(settings) | {name: ",".join(Path(p).name for p in paths) for name, paths in files.items()}


def tuning_table(rows):
    """Markdown: the best point of the grid for each arm, a column for each number of training samples."""
    chosen = {}
    for (samples, arm), made in tried(rows).items():
        point = " / ".join(f"{value:g}" for value in place(made[0]))
        chosen[arm, samples] = f"{point}: {made[0]['val_ppl']:.1f} ({len(made)})"
    if not chosen:
        return []
    arms, columns = (sorted(set(keys)) for keys in zip(*chosen, strict=True))
    lines = [[arm, *(chosen.get((arm, n), "") for n in columns)] for arm in arms]
    caption = [f"{' / '.join(GRID)}: perplexity on training dialogues held back (points tried).", ""]
    return caption + markdown(["arm", *(f"{n} samples" for n in columns)], lines)


def report(results):
    """Make and print the page, draw its pictures; the project's own page is docs/results.md."""
    page = PROJECT / "docs" / "results.md" if results == PROJECT / "results" else results / "comparison.md"
    comparison, lines = page_of(results, os.path.relpath(results, page.parent))
    perplexities(comparison, results / "results.png")
    context_curves(comparison, comparison.budgets[-1], results / "contexts.png")
    predictability(read_results(results / ROWS), results / "sweeps.png")
    write_text(page, "\n".join(lines))
    print("\n".join([*lines, f"page: {page}"]))


def page_of(results, pictures):
    """(Comparison of a folder's rows, lines of their page); pictures: where they lie, as seen from it."""
    rows = read_results(results / ROWS)
    if not rows:
        raise UserError(f"there are no results in {results}: run scripts.compare without --report first.")
    labels = {row["arm"]: "" for row in rows} | {arm: words for arm, (words, _) in ARMS.items()}
    tuned = tuning_table(row for row in read_results(results / TUNING_ROWS) if row["arm"] in ARMS)
    shown = {name: [f"![{words}]({Path(pictures, name).as_posix()}.png)"] for name, words in PICTURES.items()}
    if all(row.get("lyapunov_exponent") is None for row in rows):
        del shown["sweeps"]
    comparison = Comparison(rows)
    lines = page_lines(comparison, labels, VARIANTS, tuned, shown)
    if (results / SINGLE).exists():
        lines += (results / SINGLE).read_text(encoding="utf-8").split("\n")
    return comparison, lines


def main(config, arguments):
    """Make what is missing and report; or choose, repeat or report alone."""
    config = identified(config)
    arms = list(ARMS) if arguments.arms == "all" else arguments.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"there is no arm '{unknown[0]}': choose from {', '.join(ARMS)}.")
    results = usable_folder(arguments.results, "results")
    budgets = [tokens // config.max_seq_length for tokens in arguments.tokens]
    if not all(budgets):
        few, sample = min(arguments.tokens), config.max_seq_length
        raise UserError(f"--tokens {few} is less than one sample of {sample} tokens: give more.")
    if arguments.tune:
        tune(config, arms, budgets, results / TUNING_ROWS)
        print("\n".join(tuning_table(read_results(results / TUNING_ROWS))))
        return
    if arguments.repeat:
        repeat(config, arguments.repeat, results / ROWS)
        return
    if not arguments.report:
        runs = plan(arms, arguments.seeds, budgets, tried(read_results(results / TUNING_ROWS)))
        make(config, runs, results / ROWS, arguments.keep)
    report(results)


def flags(parser):
    """The command's own flags."""
    add = parser.add_argument
    add("--arms", default="all", help=f"comma-separated, of {', '.join(ARMS)}")
    add("--seeds", type=flag("seeds", int, Range(1)), default=5, help="seeds 0 ... N-1")
    add("--tokens", type=numbers("tokens"), default=(100_000,), help="training tokens, comma-separated")
    add("--results", type=expanded, default="results", help="folder of the rows, pictures, page")
    add("--keep", action="store_true", help="keep models and pictures, in checkpoint_dir/RUN")
    add("--repeat", default="", metavar="RUN", help="make the run of a row again, and compare its figures")
    add("--tune", action="store_true", help="choose each arm's rate, dropout and weight decay")
    add("--report", action="store_true", help="train nothing, make the page and its pictures")


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags))
