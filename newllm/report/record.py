"""What a run has written down, read back: the one source of its tables, pictures and pages. Plain numbers only."""

import re
from dataclasses import dataclass
from pathlib import Path

from newllm.errors import UserError
from newllm.report.runlog import STAGES, read_rows


@dataclass(frozen=True)
class Record:
    """A run as its record tells it.

    Attributes:
        run: its id. path: of the record.
        start: first row: device, data, versions, commit; its config and plan are those in effect when something was last trained.
        untrained, phase1, phase2: {name: value by epoch or iteration}, of the head on untrained contexts and the two phases.
        summary: what the closing block prints; {} while the run is under way.
        curves: of its final and its untrained contexts; {} as well.
        times: seconds of all parts, of saves; {} as well, and in records of earlier versions.
        sessions: how often it was started. warnings: what it survived.
    """

    run: str
    path: Path
    start: dict
    untrained: dict
    phase1: dict
    phase2: dict
    summary: dict
    curves: dict
    times: dict
    sessions: int
    warnings: list

    @property
    def config(self):
        return self.start["config"]

    @property
    def kind(self):
        return self.config["model_type"]

    @property
    def folder(self):
        """Of all artefacts of its data source."""
        return self.path.parent.parent


def read_record(path):
    """A record; of rows that a run has written twice, because it was cut off and did an epoch again, the last counts.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    path = Path(path)
    starts, rows, last, warnings = (
        [],
        {stage: {} for stage in STAGES},
        {"summary": {}, "curves": {}, "times": {}},
        [],
    )
    in_effect = {}
    try:
        for row in read_rows(path):
            stage = row.pop("stage")
            if stage == "start":
                starts.append(row)
            elif stage == "warning":
                warnings.append(row["message"])
            elif stage in STAGES:
                rows[stage][row[STAGES[stage]]] = row
                in_effect = starts[-1] if starts else {}
            elif stage in last:
                last[stage] = row
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as the record of a run ({error!r}).") from error
    if not starts:
        raise UserError(f"{path} is no record of a run of this version: it does not say how the run began.")
    columns = {
        stage: {
            name: [row.get(name) for _, row in sorted(found.items())]
            for name in next(iter(found.values()), {})
        }
        for stage, found in rows.items()
    }
    run = path.stem.removeprefix("metrics_")
    start = starts[0] | {
        name: in_effect[name] for name in ("config", "plan", "attention") if name in in_effect
    }
    return Record(run, path, start, **columns, **last, sessions=len(starts), warnings=warnings)


def find_records(folder):
    """Paths of all records below a checkpoint_dir, the newest run last."""
    found = Path(folder).glob("*/logs/metrics_*.jsonl")
    return sorted(found, key=lambda path: (re.sub(r"\D", "", path.stem), path.as_posix()))


def as_curve(curve):
    """{x: y} of numbers, from a list that counts from 1 or a dict whose keys may be text; None of nothing."""
    if not curve:
        return None
    return {float(x): y for x, y in (curve if isinstance(curve, dict) else dict(enumerate(curve, 1))).items()}
