"""Links into MLflow's UI, and the command that opens it where runs lie in an SQLite file."""

import shlex
from urllib.parse import quote, urlencode

from mmdiff_ray.tracking import store

VIEW = {"workflowType": "machine_learning"}
"""The UI's view of training runs; without it MLflow 3 opens its view of language-model applications."""


def is_server(uri: str) -> bool:
    """Return whether a store is an MLflow server, so that links into its UI exist."""
    return uri.startswith(("http://", "https://"))


def link(server: str, experiment: str = "", run: str = "", search: str = "") -> str:
    """Return a link into the UI of an MLflow server, without the password of its address.

    experiment, run: ids; with neither the link opens the list of experiments, with an experiment its runs.
    search: a filter for the runs of the experiment, in MLflow's search syntax.
    """
    page = "/experiments"
    if experiment:
        page += f"/{experiment}/runs" + (f"/{run}" if run else "")
    query = ({"searchFilter": search} if search else {}) | VIEW
    return f"{store.shown(server).rstrip('/')}/#{page}?{urlencode(query, quote_via=quote)}"


def where_to_look(uri: str, experiment: str = "", run: str = "", search: str = "") -> str:
    """Return what to open, or to type, to see the runs of a store: a link, or a command for an SQLite file.

    The arguments are those of `link`.
    """
    if is_server(uri):
        return link(uri, experiment, run, search)
    return f"MLFLOW_TRACKING_URI={shlex.quote(store.shown(uri))} mmdiff ui"
