"""The model of a run's checkpoint: the best one, the last, or any that is kept."""

from pathlib import Path
from typing import Any

from mmdiff_ray import config as configuration
from mmdiff_ray.config import ConfigError, UnreachableError, in_force
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.runs.find import Model
from mmdiff_ray.runs.folder import mirror_of
from mmdiff_ray.runs.job import read_run
from mmdiff_ray.sampling.export import save_export
from mmdiff_ray.training.checkpoint import best_of, complete, quietly, read_state
from mmdiff_ray.training.checkpoint_reader import load_files
from mmdiff_ray.training.remote_checkpoints import RemoteCheckpoints, download_files


def of_checkpoint(model: Model, which: str) -> Model:
    """Return the averaged model of a run's checkpoint, written as an export into `exports/` of its folder.

    which: best, last, or samples seen. Raises ConfigError where the model is no run's, or has no such
    checkpoint.
    """
    if model.run is None:
        raise ConfigError(f"--checkpoint needs a run; {model.name} is a published model")
    states = _states(model.run)
    picked = {"best": best_of(states), "last": max(states, default=None)}
    name = (
        picked.get(which)
        if which in picked
        else next((one for one in states if which == f"{int(one)}"), None)
    )
    if name is None:
        known = ", ".join(f"{int(one)}" for one in sorted(states)) or "none"
        raise ConfigError(
            f"--checkpoint {which}: {model.name} has the checkpoints {known}; want best or last, too"
        )
    config = in_force(configuration.load_saved(model.run / "config.yaml"), int(name))
    denoiser = build_denoiser(config)
    tensors: dict[str, Any] = {"ema": denoiser.state_dict()}
    files = _files(model.run, name, states[name])
    quietly(load_files, tensors, files / states[name].get("mark", ""), no_dist=True)
    denoiser.load_state_dict(tensors["ema"])
    out = model.run / "exports" / name
    facts = {key: states[name].get(key) for key in ("progress", "version", "metric", "figure")}
    save_export(out, config, denoiser, facts)
    return Model(str(out), f"{model.name}-{int(name)}")


def _states(run: Path) -> dict[str, dict[str, Any]]:
    """Return the states of a run's complete checkpoints, in storage where the run is kept there."""
    if (remote := _remote(run)) is None:
        return {path.name: read_state(path) for path in complete(run / "checkpoints")}
    try:
        return remote.stored()
    except OSError as error:
        raise UnreachableError(f"runs: cannot look into {remote.mirror.uri}: {error}") from None


def _files(run: Path, name: str, state: dict[str, Any]) -> Path:
    """Return the folder of a checkpoint on this machine, fetched from storage where the run is kept there."""
    place = run / "checkpoints" / name
    if (remote := _remote(run)) is not None:
        download_files(remote.mirror.fs, remote.mirror.path(f"checkpoints/{name}"), place, state)
    return place


def _remote(run: Path) -> RemoteCheckpoints | None:
    mirror, facts = mirror_of(run), read_run(run)
    return None if mirror is None else RemoteCheckpoints(mirror, facts.get("lineage") or facts["run_id"], 1)
