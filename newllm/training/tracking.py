"""Live figures in TensorBoard, Trackio or Weights & Biases, through accelerate: optional, and never able to stop a run."""

from accelerate.tracking import filter_trackers

COUNTERS = "steps", "iteration", "epoch"  # what a row counts, the finest first


def start_tracking(accelerator, name, folder, config, warn):
    """Begin to send the rows of a run's record to a tracker.

    Args:
        name: "tensorboard", "trackio" or "wandb".
        folder: where a tracker that writes files may do so, e.g. `<checkpoint_dir>/<data>/tracking/<run>`.
        config: settings, a dict of plain values. warn: function of a line, called at the first failure, which is the last.

    Returns:
        Function of (stage, values) for newllm.report.record.RunLog.
    """
    working = True

    def attempt(what, function):
        nonlocal working
        if not working:
            return
        try:
            function()
        except Exception as error:  # whatever a service or its client raises; KeyboardInterrupt and Stopped are none of these
            working = False
            warn(f"warning: {name} {what} ({type(error).__name__}: {error}); the run goes on without it")

    def begin():
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = filter_trackers(name, str(folder))
        if not accelerator.log_with:
            raise ImportError(f"pip install {name}")
        accelerator.init_trackers("newllm", config)

    def follow(stage, values):
        numbers = {
            f"{stage}/{key}": value
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        step = next((values[counter] for counter in COUNTERS if counter in values), None)
        if numbers and step is not None:
            attempt("failed", lambda: accelerator.log(numbers, step=step))

    attempt("cannot begin", begin)
    return follow
