"""One run as one file to keep or to share: settings and record, pictures, page, tables, best weights.

python3 -m scripts.export                        # the latest complete run, as newllm_TYPE_RUN.zip in this folder
python3 -m scripts.export RUN --output my.zip
python3 -m scripts.export --refresh FOLDER       # an exported transformers folder: today's code, the same weights
"""

import argparse
import os
import zipfile
from pathlib import Path

from config import ResidualConfig
from newllm.errors import UserError, exit_on_user_error
from newllm.reporting.artifacts import artifact_paths, find_run, runs_in
from newllm.training.trained import open_saved


def main(arguments=None):
    """Write the file and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", help="id of a run; none: the latest")
    parser.add_argument("--checkpoint_dir", default=ResidualConfig.checkpoint_dir, help="folder of the runs")
    parser.add_argument("--format", choices=("zip", "transformers"), default="zip", help="what to write")
    parser.add_argument("--output", help="the file, or the folder, to write")
    parser.add_argument("--refresh", metavar="FOLDER", help="rewrite the code in a folder of --format transformers")
    options = parser.parse_args(arguments)
    if options.refresh is not None:
        refresh(options)
        return
    records = runs_in(options.checkpoint_dir)
    record = find_run(records, options.run) if options.run else records[-1]
    artifacts = artifact_paths(record.folder, record.kind, record.run)
    target = place(options.output or f"newllm_{record.kind}_{record.run}{'.zip' * (options.format == 'zip')}")
    if options.format == "transformers":
        from newllm.transformers_export import export_folder  # transformers is slow to import, and needed here alone

        export_folder(open_saved(artifacts["model"])[1], record, target)
        print(f"{target}: AutoModelForCausalLM.from_pretrained({str(target)!r}, trust_remote_code=True)")
        return
    paths = [record.path, *artifacts.values()]
    write_zip(target, record.folder, [path for path in paths if path.exists()])
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    with zipfile.ZipFile(target) as archive:
        for entry in archive.infolist():
            print(f"  {entry.filename} {entry.file_size / 1e6:.2f} MB")


def place(text):
    """A path of the command line; ~ and $HOME mean home."""
    return Path(os.path.expandvars(text)).expanduser()


def refresh(options):
    """Rewrite the code of a folder exported before.

    Raises:
        UserError: it is no such folder, or it is given beside something to export.
    """
    if options.run or options.output:
        raise UserError("--refresh rewrites one folder in place: give neither a run nor --output beside it.")
    from newllm.transformers_export import refresh_folder

    folder = place(options.refresh)
    refresh_folder(folder)
    print(f"{folder}: its code is that of this project now; weights and tokenizer are as they were")


def write_zip(target, folder, paths):
    """Put files into an archive under their names below a folder; it takes its name when it is whole.

    Raises:
        UserError: it cannot be written, or a file cannot be read.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, Path(folder.name) / path.relative_to(folder))
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}): choose another --output.") from error
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
