"""Live figures in TensorBoard, Trackio or Weights & Biases, through accelerate. They cannot stop a run."""

from accelerate.tracking import filter_trackers


def start_tracking(accelerator, name, folder, config, warn):
    """Begin to send the rows of a run's record to a tracker, which writes its files into `folder`.

    Returns:
        Function of (stage, values) for RunLog. At the first failure, also the last, `warn` gets a line.
    """

    def attempt(function, *arguments):
        try:
            function(*arguments)
        except Exception as error:  # whatever a service or its client raises
            accelerator.trackers.clear()
            warn(f"warning: {name} failed ({type(error).__name__}: {error}); the run goes on without it")

    def begin():
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = filter_trackers(name, str(folder))
        if not accelerator.log_with:
            raise ImportError(f"pip install {name}")
        accelerator.init_trackers("newllm", config)

    def follow(stage, values):
        numbers = {f"{stage}/{key}": value for key, value in values.items() if type(value) in (int, float)}
        step = values.get("steps", values.get("iteration", values.get("epoch")))  # the finest of its counts
        if step is not None:
            attempt(accelerator.log, numbers, step)

    attempt(begin)
    return follow
