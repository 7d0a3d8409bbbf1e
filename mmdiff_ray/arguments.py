"""The words of the command line: every command, its arguments, its help."""

import argparse
from pathlib import Path

from mmdiff_ray import __version__

RUNS = "where runs lie: a folder, or any URI of pyarrow (s3://bucket/runs)"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="mmdiff", description="Train multi-modal, multi-task diffusion models on Ray."
    )
    parser.add_argument("--version", action="version", version=f"mmdiff {__version__}")
    parser.add_argument("-C", dest="working_folder", metavar="DIR", help="work in this folder")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_data(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_experiment(commands)
    _add_sweep(commands)
    _add_submit(commands)
    _add_jobs(commands)
    _add_cluster(commands)
    _add_ui(commands)
    _add_sync(commands)
    _add_doctor(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: str, text: str, example: str, **more):  # type: ignore[no-untyped-def,type-arg]
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )
    command.set_defaults(run=run)
    return command


class _PipelineHelp(argparse._HelpAction):
    """Help that tells the options of the pipeline that was named before it, or else of all."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        from pipelines.options import describe

        parser.epilog = f"{describe(getattr(namespace, 'pipeline', None))}\n\n{parser.epilog}"
        super().__call__(parser, namespace, values, option_string)


def _add_data(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    data = commands.add_parser("data", help="build data sets and look at them")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    build = _command(
        actions,
        "build",
        "data_build",
        "build a data set of shards from a raw source",
        "mmdiff data build folder --source photos --out data/photos --size 64",
        add_help=False,
    )
    build.add_argument(
        "-h", "--help", action=_PipelineHelp, help="show this, with the pipeline's options, and exit"
    )
    build.add_argument("pipeline", help="openmoji, sprites, fashion_mnist, digits, folder, or your own")
    build.add_argument(
        "--out", required=True, help="where to: a folder, or any URI of pyarrow (s3://bucket/name)"
    )
    build.add_argument("--force", action="store_true", help="replace a data set that is already there")
    build.add_argument(
        "--workers", type=int, default=1, help="Ray actors per embedding model; 0: without Ray"
    )
    build.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="of the Ray nodes to run on"
    )
    build.add_argument(
        "options", nargs="*", metavar="key=value", help="the pipeline's options; --key value works too"
    )
    inspect = _command(
        actions, "inspect", "data_inspect", "show what is in a data set", "mmdiff data inspect data/openmoji"
    )
    inspect.add_argument("uri", help="the folder or URI of the data set")
    inspect.add_argument(
        "--picture", type=Path, help="where to draw some rows (default: the URI's last part, .png, here)"
    )
    embed = _command(
        actions,
        "embed",
        "data_embed",
        "make the embedding of a text or picture, as `mmdiff sample --given` takes it",
        "mmdiff data embed minilm 'a red cat' --out caption.npy",
    )
    embed.add_argument("embedder", help="minilm, efficientnet-lite0 or open_clip:MODEL[:weights]")
    embed.add_argument("value", help="a text, or the file of a picture")
    embed.add_argument("--out", type=Path, required=True, help="the .npy file to write")


def _add_train(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    train = _command(
        commands,
        "train",
        "train",
        "train a model",
        "mmdiff train pipelines/configs/openmoji.yaml train.samples=500000 workers.count=2",
    )
    train.add_argument("config", nargs="?", help="a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print sizes and costs, start nothing"
    )
    train.add_argument(
        "--continue",
        action="store_true",
        dest="go_on",
        help="go on with the run of this name if it has begun, else begin it: for jobs that may be restarted",
    )
    train.add_argument("--resume", metavar="RUN", help="go on with a run, by its name, folder or URI")
    train.add_argument(
        "--new-mlflow-run",
        action="store_true",
        help="with --resume: record in a new MLflow run, for example because the old one was deleted",
    )
    train.add_argument("--runs", default="runs", help=f"{RUNS} (for --resume)")


def _add_sample(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    sample = _command(
        commands,
        "sample",
        "sample",
        "draw samples from a trained model, any modality from any other",
        "mmdiff sample demo --given category='Food & Drink' --num 16",
    )
    _add_drawing(sample, num=None)
    sample.add_argument(
        "--hole", help="for a given masked image: a picture, white is the hole (else alpha 0 is)"
    )
    sample.add_argument("--out", type=Path, help="a folder (default: samples/RUN-...)")


def _add_drawing(command: argparse.ArgumentParser, num: int | None) -> None:
    """Add the options of drawing samples. num: how many by default; None: one likely answer or 16 samples."""
    command.add_argument("model", metavar="RUN", help="a run's name, folder or URI")
    command.add_argument(
        "--given", action="append", default=[], metavar="INSTANCE=VALUE", help="a name, or a file"
    )
    command.add_argument("--num", type=int, default=num, help=f"default: {num or 16}")
    command.add_argument("--sampler", help="ancestral, ddim or dpm2")
    command.add_argument("--steps", type=int)
    command.add_argument(
        "--likely",
        action=argparse.BooleanOptionalAction,
        help="the most likely answer, in a few noiseless steps, or a sample (default: the task's readout)",
    )
    command.add_argument("--guidance", type=float, default=1.0, help="above 1: closer to what is given")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--runs", default="runs", help=RUNS)


def _add_generate(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    generate = _command(
        commands,
        "generate",
        "generate",
        "draw many samples into a data set of shards, by a pool of models on Ray; goes on where it stopped",
        "mmdiff generate demo --num 10000 --out data/generated --workers 2",
    )
    _add_drawing(generate, num=1000)
    generate.add_argument("--out", required=True, help="a folder, or any URI of pyarrow (s3://bucket/name)")
    generate.add_argument("--workers", type=int, default=1, help="models at once; 0: in this process")
    generate.add_argument("--force", action="store_true", help="replace a data set that is already there")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    evaluate = _command(
        commands,
        "evaluate",
        "evaluate",
        "measure a trained model on held-out rows, beside the rules that need no model",
        "mmdiff evaluate demo evaluate.rows=64",
    )
    evaluate.add_argument("model", metavar="RUN", help="a run's name, folder or URI")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="values of evaluate.* and data.*")
    evaluate.add_argument("--workers", type=int, default=0, help="models at once on Ray; 0: in this process")
    evaluate.add_argument("--runs", default="runs", help=RUNS)


def _add_experiment(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    experiment = _command(
        commands,
        "experiment",
        "experiment",
        "train, measure and compare all methods of a table; goes on where it stopped",
        "mmdiff experiment masked_image --preset smoke",
    )
    experiment.add_argument("name", help="a name in pipelines/configs/experiments, or a YAML file")
    experiment.add_argument("--preset", default="small", help="how large: smoke, small or gpu")
    experiment.add_argument("--runs", default="runs/experiments", help="the folder where cells are kept")
    experiment.add_argument(
        "--out",
        type=Path,
        help="OUT.json, OUT.md and more are written (default: results/NAME, for smoke in --runs)",
    )
    experiment.add_argument(
        "--cells", nargs="+", default=["*"], metavar="PATTERN", help="run these alone, as ours-* or *-0"
    )
    experiment.add_argument("--table", action="store_true", help="only write the result of what is there")


def _add_sweep(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    sweep = _command(
        commands,
        "sweep",
        "sweep",
        "search a space of settings by Ray Tune; goes on where it stopped",
        "mmdiff sweep sweeps/quickstart.yaml budget.trials=8",
    )
    sweep.add_argument("file", nargs="?", help="a YAML file, such as sweeps/quickstart.yaml; or: report")
    sweep.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="values of budget.*, searcher.*, scheduler.*, seed, or of the configuration",
    )
    sweep.add_argument("--dry-run", action="store_true", help="check it, print space and cost, start nothing")
    sweep.add_argument("--resume", metavar="SWEEP", help="go on with a sweep that was cut short")
    sweep.add_argument("--runs", default="runs", help="the folder where runs lie")


ADDRESS = (
    "the cluster's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the cluster "
    "of `mmdiff cluster up` in this folder)"
)
TOKEN = (
    "For a cluster with token authentication (RAY_AUTH_MODE=token), set RAY_AUTH_TOKEN to the token or\n"
    "RAY_AUTH_TOKEN_PATH to its file. The token of `mmdiff cluster up` is found automatically."
)


def _add_submit(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    submit = _command(
        commands,
        "submit",
        "submit",
        "run a command on a Ray cluster, with the code and files of this folder",
        "mmdiff submit --follow -- train pipelines/configs/demo.yaml train.samples=500000",
    )
    submit.epilog += (
        f"\n\n{TOKEN}\nThe job gets the MLFLOW_* and AWS_* variables of this shell. Ray shows them to\n"
        "all who have the cluster's token, and logs them. On a shared cluster give the nodes a role."
    )
    submit.add_argument("--address", metavar="URL", help=ADDRESS)
    submit.add_argument("--name", help="first part of the job's id (default: the run's name)")
    submit.add_argument("--follow", action="store_true", help="print the job's output until it ends")
    submit.add_argument("--num-workers", type=int, metavar="N", help="for train: same as workers.count=N")
    submit.add_argument(
        "--folder",
        metavar="DIR",
        help="folder on the cluster's shared disk that relative paths (runs/, data/) start from (default on "
        "this machine's cluster: this folder)",
    )
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable for the job"
    )
    submit.add_argument("--pip", action="store_true", help="install requirements.lock on the cluster first")
    submit.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="train, data, ...")


def _add_jobs(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    jobs = commands.add_parser("jobs", help="list, follow and stop submitted jobs")
    actions = jobs.add_subparsers(required=True, metavar="ACTION")
    shown = {
        "list": ("list the jobs of a cluster", "mmdiff jobs list"),
        "status": ("show a job and its runs in MLflow", "mmdiff jobs status demo-1a2b3c"),
        "logs": ("print a job's output", "mmdiff jobs logs --follow demo-1a2b3c"),
        "stop": ("stop a job; it saves a checkpoint first", "mmdiff jobs stop demo-1a2b3c"),
    }
    for name, (text, example) in shown.items():
        action = _command(actions, name, f"jobs_{name}", text, example)
        action.epilog += f"\n\n{TOKEN}"
        action.add_argument("--address", metavar="URL", help=ADDRESS)
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="print until the job ends")
        if name == "stop":
            action.add_argument("--no-wait", action="store_true", help="return at once")
        if name != "list":
            action.add_argument("job", metavar="ID", help="as `mmdiff jobs list` prints it")


def _add_cluster(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    cluster = commands.add_parser("cluster", help="start and end a real Ray cluster on this machine")
    actions = cluster.add_subparsers(required=True, metavar="ACTION")
    shown = {
        "up": (
            "start a head and workers on this machine; their state is in .cluster/",
            " --workers 2 --cpus 4",
        ),
        "down": ("end the cluster of this folder, and no other Ray", ""),
        "status": ("print whether the cluster of this folder is up", ""),
    }
    for name, (text, options) in shown.items():
        action = _command(actions, name, f"cluster_{name}", text, f"mmdiff cluster {name}{options}")
        if name == "up":
            action.add_argument("--workers", type=int, default=2, help="number of worker nodes")
            action.add_argument("--cpus", type=int, default=4, help="CPUs per worker, as Ray counts them")


def _add_ui(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    ui = _command(commands, "ui", "ui", "open MLflow on the runs of this folder", "mmdiff ui --port 5000")
    ui.add_argument("--runs", default="runs", help=RUNS)
    ui.add_argument("--host", default="127.0.0.1")
    ui.add_argument("--port", type=int, default=5000)


def _add_sync(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    sync = _command(
        commands, "sync", "sync", "send what runs recorded while MLflow was away", "mmdiff sync runs/demo"
    )
    sync.add_argument(
        "folder", nargs="?", default="runs", help="a run's, or that of all runs, or a URI of either (runs)"
    )


def _add_doctor(commands: argparse._SubParsersAction) -> None:  # type: ignore[type-arg]
    doctor = _command(
        commands, "doctor", "doctor", "check this machine and say what is missing", "mmdiff doctor"
    )
    doctor.add_argument("--runs", default="runs", help=RUNS)
