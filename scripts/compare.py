"""The evidence: every arm at every seed and budget, then tables, pictures and verdicts.

    python3 -m scripts.compare --data_source dialogues.jsonl --tokenizer bpe --seeds 5 --tokens 6400,25000,100000
    python3 -m scripts.compare --arms phase1_frozen,gru --seeds 3    # some arms; other settings are flags, as in train.py
    python3 -m scripts.compare --tune --tokens 25000                 # each arm's rate and dropout, on a split of the training samples
    python3 -m scripts.compare --report                              # tables and pictures from the results that are there

Each run leaves one small JSON file in `results/`, from which the tables are made, and with `--keep` what train.py leaves (model,
pictures, page, summary) in `checkpoint_dir/RUN`: scripts.report and scripts.export take that folder by --checkpoint_dir. Cut off and started again, also with more
arms, seeds or budgets, it makes what is missing there; a run in hand goes on from its own checkpoint. Several of these may share
`results/` at a time, each with arms and a checkpoint_dir of its own.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import train
from config import ResidualConfig
from newllm.apart import call_apart
from newllm.config import EARLIER, Range, expanded, flag, parse_args
from newllm.errors import UserError, exit_on_user_error
from newllm.report.comparison import Comparison, markdown, read_json, read_result, read_results, write_report
from newllm.report.plots import comparison_points, context_curves
from newllm.report.summary import plain
from newllm.report.sweep import Sweep
from newllm.saving.files import usable_folder, write_text
from newllm.saving.guard import FolderLock
from newllm.saving.runs import shaping
from newllm.saving.stop import Interrupt

UNTRAINED = dict(phase1_max_iterations=0)
FROZEN = dict(freeze_context=True)
ARMS = {  # name: settings in which it differs from the settings of the command
    "token": dict(model_type="token"),
    "window": dict(model_type="window"),
    "window_whitened": dict(model_type="window", whiten_context=True),
    "untrained_frozen": UNTRAINED | FROZEN,
    "untrained_whitened": UNTRAINED | FROZEN | dict(whiten_context=True),
    "phase1_frozen": FROZEN,
    "phase1_shuffled": FROZEN | dict(phase1_shuffle=True),
    **{f"phase1_w{weight:g}": FROZEN | dict(dist_reg_weight=weight) for weight in (0.0, 0.1, 0.5, 0.9, 1.0)},
    "phase1_finetuned": {},
    "phase1_finetuned_gpt2": dict(tokenizer="gpt2"),  # other tokens: compare bits per byte
    "end_to_end": UNTRAINED,
    "gru": dict(model_type="gru"),
    "lstm": dict(model_type="lstm"),
    "transformer": dict(model_type="transformer"),
}
GRID = dict(
    phase2_learning_rate=(0.0005, 0.001, 0.002, 0.004), dropout=(0.0, 0.15, 0.3, 0.5)
)  # the same for every arm
TUNING_START = (0.002, 0.3)
TUNED_AS = {  # an ablation differs from its arm in one thing: it takes what that arm was tuned to
    **{arm: "phase1_frozen" for arm in ARMS if arm.startswith(("phase1_w", "phase1_shuffled"))},
    "phase1_finetuned_gpt2": "phase1_finetuned",
}
TUNE_SHARE, TUNE_SEED = 0.2, 1000  # neither the validation samples nor the seeds of the comparison
TUNED = "tuned.json"


def plan(arms, seeds, budgets, tuned):
    """{name of a run: its settings} for all arms, seeds and numbers of samples."""
    runs = {}
    for samples, seed, arm in itertools.product(budgets, range(seeds), arms):
        chosen = tuned.get(str(samples), {}).get(TUNED_AS.get(arm, arm), {})
        runs[f"{arm}-{samples}-{seed}"] = dict(num_samples=samples, seed=seed) | ARMS[arm] | chosen
    return runs


def tune(config, arms, budgets, folder):
    """Walk each arm's grid, from TUNING_START, until no neighbour of its best point is better on training dialogues held back.

    Raises:
        UserError, Stopped: as `make`.
    """
    for samples, arm in itertools.product(budgets, [arm for arm in arms if arm not in TUNED_AS]):
        split = ARMS[arm] | dict(num_samples=samples, tune_share=TUNE_SHARE, seed=TUNE_SEED)
        points = {TUNING_START}
        while points:
            runs = {
                "-".join([arm, str(samples), *(f"{value:g}" for value in point)]): split
                | dict(zip(GRID, point, strict=True))
                for point in sorted(points)
            }
            make(config, runs, folder)
            made = [
                r for r in read_results(folder) if r["arm"] == arm and r["changes"]["num_samples"] == samples
            ]
            best = min(made, key=lambda result: result["val_loss"])
            points = neighbours(place(best)) - {place(result) for result in made}


def place(result):
    """The point of the grid at which a result was made."""
    return tuple(result["changes"][name] for name in GRID)


def neighbours(point):
    """Points of the grid one step away along one axis."""
    found = set()
    for axis, values in enumerate(GRID.values()):
        at = values.index(point[axis])
        for value in values[max(at - 1, 0) : at + 2]:
            found.add((*point[:axis], value, *point[axis + 1 :]))
    return found - {point}


def make(config, runs, results, keep=False):
    """Train what is missing; each run's figures go into a file of its own in the folder `results`, which says what is made.

    Args:
        keep: whether runs leave their artefacts too, each in a folder of its own in checkpoint_dir.

    Raises:
        UserError: `results` holds such a run with other settings, or a run failed.
        Stopped: a signal or max_minutes ended the comparison early.
    """
    folder = usable_folder(config.checkpoint_dir, "checkpoint_dir")
    shared = {name: value for name, value in shaping(config.to_dict(), "budget").items() if name != "seed"}

    def configured(name):
        own = dict(
            checkpoint_dir=str(folder / name), keep_last=0, backup_dir="", max_minutes=0.0, artifacts=keep
        )
        return dataclasses.replace(config, **own | dict(untrained_control=False) | runs[name])

    def made(name):
        path = results / f"{name}.json"
        if not path.exists():
            return None
        found, settings = read_result(path), meaning(configured(name).to_dict())
        before = meaning(EARLIER | found["settings"])
        if before != settings:
            changed = [key for key in before | settings if before.get(key) != settings.get(key)]
            raise UserError(
                f"{path} was made with other settings ({', '.join(changed)}): choose another --results, or move it away."
            )
        return plain(found)

    def work(run):
        name = run["name"]
        if found := made(name):  # in the meantime, by another process
            return found
        summary = call_apart(train.main, configured(name))
        summary["val_sample_nats"] = [round(nats, 3) for nats in summary["val_sample_nats"]]
        result = {"arm": name.split("-")[0], "seed": configured(name).seed, "changes": runs[name]} | summary
        write_text(
            results / f"{name}.json",
            json.dumps(result | {"settings": meaning(configured(name).to_dict())}) + "\n",
        )
        return plain(summary)

    with Interrupt(config.max_minutes), FolderLock(folder, "comparison"):
        sizes = {name: configured(name).num_samples for name in runs}
        Sweep(folder, shared, sizes, fresh=not config.load_checkpoint, made=made).finish(work)


def meaning(settings):
    """The settings that shape a run's figures. In which folder its text lies and what machine it ran on do not."""
    return shaping(settings) | {"data_source": Path(settings["data_source"]).name}


def choose(results):
    """{number of samples, as text: {arm: its point of the grid with the lowest loss on the tuning split}}."""
    best = {}
    for result in results:
        at = best.setdefault(str(result["changes"]["num_samples"]), {})
        if result["arm"] not in at or result["val_loss"] < at[result["arm"]]["val_loss"]:
            at[result["arm"]] = result
    return {
        samples: {arm: dict(zip(GRID, place(result), strict=True)) for arm, result in at.items()}
        for samples, at in best.items()
    }


def tuning_rows(results):
    """The best point of the grid for each number of samples and arm, its perplexity on the tuning split, points tried."""
    tried = {}
    for result in sorted(results, key=lambda result: result["val_loss"]):
        tried.setdefault((result["changes"]["num_samples"], result["arm"]), []).append(result)
    for (samples, arm), (best, *others) in sorted(tried.items()):
        yield (
            samples,
            arm,
            *(f"{value:g}" for value in place(best)),
            f"{best['val_ppl']:.1f}",
            1 + len(others),
        )


def main(config, arguments):
    """Make what is missing, choose or report."""
    arms, results = chosen_arms(arguments.arms), usable_folder(arguments.results, "results")
    budgets = [tokens // config.max_seq_length for tokens in whole_numbers(arguments.tokens)]
    if arguments.tune:
        folder = usable_folder(results / "tuning", "results")
        tune(config, arms, budgets, folder)
        tuned = choose(read_results(folder))
        write_text(results / TUNED, json.dumps(tuned, indent=1) + "\n")
        print(
            "\n".join(
                markdown(
                    ("samples", "arm", *GRID, "val ppl", "points tried"), tuning_rows(read_results(folder))
                )
            )
        )
        return
    if not arguments.report:
        tuned = read_json(results / TUNED) if (results / TUNED).exists() else {}
        make(config, plan(arms, arguments.seeds, budgets, tuned), results, arguments.keep)
    comparison = Comparison(read_results(results))
    print("\n".join(write_report(comparison, results)))
    for tokens in comparison.budgets:
        comparison_points(comparison, tokens, results / f"comparison_{tokens}.png")
        context_curves(comparison, tokens, results / f"contexts_{tokens}.png")


def chosen_arms(text):
    """Names of arms from "a,b,c"; all of them from "all".

    Raises:
        UserError: there is no such arm.
    """
    arms = list(ARMS) if text == "all" else text.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"there is no arm '{unknown[0]}': choose from {', '.join(ARMS)}.")
    return arms


def whole_numbers(text):
    """Numbers from "6400,100000".

    Raises:
        UserError: something else is among them.
    """
    try:
        return [int(word.replace("_", "")) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--tokens takes numbers with commas between them, not '{text}'.") from None


def flags(parser):
    """The command's own flags."""
    parser.add_argument("--arms", default="all", help=f"comma-separated, of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=flag("seeds", int, Range(1)), default=5, help="seeds 0 ... N-1")
    parser.add_argument("--tokens", default="100000", help="training tokens, comma-separated")
    parser.add_argument(
        "--results", type=expanded, default="results", help="folder of the figures, one small file a run"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep models, pictures, tables of the runs made, in checkpoint_dir/RUN",
    )
    parser.add_argument(
        "--tune", action="store_true", help="choose each arm's learning rate and dropout, from a grid"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, make tables and pictures")


if __name__ == "__main__":
    with exit_on_user_error():
        main(*parse_args(ResidualConfig, description=__doc__.splitlines()[0], extra=flags))
