"""`mmdiff jobs`: list, show, follow and stop submitted jobs."""

import argparse

from mmdiff_ray.cli.common import Commands, command

ADDRESS = (
    "the cluster's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the cluster "
    "of `mmdiff cluster up` in this folder)"
)
TOKEN = (
    "For a cluster with token authentication (RAY_AUTH_MODE=token), set RAY_AUTH_TOKEN to the token or\n"
    "RAY_AUTH_TOKEN_PATH to its file. The token of `mmdiff cluster up` is found automatically."
)
ACTIONS = {
    "list": ("list the jobs of a cluster", "mmdiff jobs list"),
    "status": ("show a job and its runs in MLflow", "mmdiff jobs status demo-1a2b3c"),
    "logs": ("print a job's output", "mmdiff jobs logs --follow demo-1a2b3c"),
    "stop": ("stop a job; it saves a checkpoint first", "mmdiff jobs stop demo-1a2b3c"),
}


def add(commands: Commands) -> None:
    """Add `jobs list`, `jobs status`, `jobs logs` and `jobs stop`."""
    jobs = commands.add_parser("jobs", help="list, follow and stop submitted jobs")
    actions = jobs.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, (text, example) in ACTIONS.items():
        action = command(actions, name, text, example, _run)
        action.epilog = f"{action.epilog}\n\n{TOKEN}"
        action.add_argument("--address", metavar="URL", help=ADDRESS)
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="print until the job ends")
        if name == "stop":
            action.add_argument("--no-wait", action="store_true", help="return immediately")
        if name != "list":
            action.add_argument("job", metavar="ID", help="job id from `mmdiff jobs list`")


def _run(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed import jobs as client
    from mmdiff_ray.distributed.display import make_console

    console = make_console()
    if given.action == "list":
        return client.list_jobs(given.address, console)
    if given.action == "status":
        return client.show_job(given.address, given.job, console)
    if given.action == "logs":
        return client.show_logs(given.address, given.job, given.follow, console)
    return client.stop_job(given.address, given.job, not given.no_wait, console)
