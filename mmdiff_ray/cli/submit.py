"""`mmdiff submit`: run a command on a Ray cluster."""

import argparse

from mmdiff_ray.cli.common import Commands, command
from mmdiff_ray.cli.jobs import ADDRESS, TOKEN
from mmdiff_ray.config import ConfigError


def add(commands: Commands) -> None:
    """Add `submit`."""
    submit = command(
        commands,
        "submit",
        "run a command on a Ray cluster, with the code and files of this folder",
        "mmdiff submit --follow -- train pipelines/configs/demo.yaml train.samples=500000",
        _run,
    )
    submit.epilog = (
        f"{submit.epilog}\n\n{TOKEN}\nThe job gets the MLFLOW_* and AWS_* variables of this shell. Ray shows "
        "them to\nall users with the cluster's token, and logs them. On a shared cluster, use IAM roles of "
        "the nodes."
    )
    submit.add_argument("--address", metavar="URL", help=ADDRESS)
    submit.add_argument("--name", help="prefix of the job id (default: the run's name)")
    submit.add_argument("--follow", action="store_true", help="print the job's output until it ends")
    submit.add_argument("--num-workers", type=int, metavar="N", help="for train: same as workers.count=N")
    submit.add_argument(
        "--folder",
        metavar="DIR",
        help="folder on the cluster's shared disk for relative paths such as runs/ and data/ "
        "(default for the cluster on this machine: this folder)",
    )
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable for the job"
    )
    submit.add_argument("--pip", action="store_true", help="install requirements.lock on the cluster first")
    submit.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="train, data, ...")


def _run(given: argparse.Namespace) -> int:
    from mmdiff_ray.cli import parse
    from mmdiff_ray.distributed.display import make_console
    from mmdiff_ray.distributed.jobs import show_logs
    from mmdiff_ray.jobs.submit import submit

    words = given.words[1:] if given.words[:1] == ["--"] else given.words
    if not words:
        raise ConfigError("submit needs a command: mmdiff submit -- train pipelines/configs/demo.yaml")
    sent = parse(words)
    check_to_send(sent)
    console = make_console()
    job = submit(given, words, sent, console)
    if given.follow:
        return show_logs(given.address, job, True, console)
    for action in ("logs --follow", "stop"):
        console.print(f"next      mmdiff jobs {action} {job}", soft_wrap=True)
    return 0


def check_to_send(sent: argparse.Namespace) -> None:
    """Raise ConfigError if a command has invalid arguments or cannot be submitted."""
    sent.check(sent)
    if getattr(sent, "dry_run", False):
        raise ConfigError("--dry-run cannot be submitted; submit checks every command before it sends it")
    if sent.command == "sweep" and sent.file is not None and sent.file != "report":
        from mmdiff_ray.sweeps.spec import first_valid_config, load_sweep

        first_valid_config(load_sweep(sent.file, sent.overrides))
