"""`mmdiff try`: a web page to give any modalities and generate all others."""

import argparse
import os
import threading
from collections.abc import Callable
from typing import Any

from mmdiff_ray.cli.common import Commands, add_model, command, model_of
from mmdiff_ray.cli.ui import check_free
from mmdiff_ray.config import ConfigError

PICTURES, FILES = ("image", "mask", "masked_image", "latent"), ("embedding", "map")
"""Types whose input is an image, and types whose input is an array in a file."""
READOUTS = {"default of the task": None, "sample": False, "most likely": True}


def add(commands: Commands) -> None:
    """Add `try`."""
    parser = command(
        commands,
        "try",
        "open a web page to give any modalities and generate all others",
        "mmdiff try demo --port 7860",
        _try,
    )
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="another address opens the page to others")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--password", help="password of the user mmdiff")


def _try(given: argparse.Namespace) -> int:
    """Serve the page until interrupted. Raises ConfigError for an open address without a password."""
    from mmdiff_ray.sampling.export import load_export

    if given.host not in ("127.0.0.1", "localhost", "::1") and not given.password:
        raise ConfigError(f"--host {given.host} opens the page to others; add --password WORD")
    check_free(given.host, given.port)
    found = model_of(given)
    shown = page(load_export(found.where), found.name)
    try:
        shown.launch(
            server_name=given.host,
            server_port=given.port,
            share=False,
            quiet=True,
            auth=("mmdiff", given.password) if given.password else None,
            footer_links=[],
            prevent_thread_lock=True,
        )
        print(f"page: http://{given.host}:{given.port} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        os._exit(0)  # exit now: open browser connections would keep the server alive for minutes
    return 0


def page(model: Any, name: str) -> Any:
    """Return the page of a model (`Generator`) as gradio's Blocks. Raises ConfigError without gradio."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise ConfigError("mmdiff try needs gradio: pip install 'mmdiff-ray[try]'") from None

    names = list(model.denoiser.modalities)
    with gradio.Blocks(title=f"{name} - mmdiff", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {name}\nGive any inputs; everything else is generated.")
        with gradio.Row():
            with gradio.Column(scale=1):
                inputs = [_field(gradio, model.modality(one), one) for one in names]
            with gradio.Column(scale=2):
                with gradio.Row():
                    readout = gradio.Radio(list(READOUTS), value=next(iter(READOUTS)), label="output")
                    num = gradio.Slider(1, 16, 4, step=1, label="samples")
                    guidance = gradio.Slider(1, 4, 1, step=0.5, label="guidance")
                    seed = gradio.Number(0, precision=0, label="seed")
                button = gradio.Button("Generate", variant="primary")
                shown = gradio.Image(label="given and generated", format="png", interactive=False)
                players = [gradio.Audio(label=name, interactive=False) for name in _sounds(model)]
                notes = gradio.Markdown()
        fields = [*inputs, num, guidance, readout, seed]
        button.click(_answer(gradio, model, names), fields, [shown, *players, notes])
    return blocks


def _field(gradio: Any, modality: Any, name: str) -> Any:
    """Return the input field of a modality."""
    kind = modality.options.type
    if kind in PICTURES:
        label = f"{name} (transparent pixels are the hole)" if kind == "masked_image" else name
        return gradio.Image(
            label=label, type="filepath", image_mode=None, format="png", height=140,
            sources=["upload", "clipboard"],
        )  # fmt: skip
    if kind == "audio":
        return gradio.Audio(label=name, type="filepath", format="wav", sources=["upload", "microphone"])
    if kind == "label":
        return gradio.Dropdown(["", *(modality.options.names or [])], value="", label=name)
    if kind in FILES:
        return gradio.File(label=f"{name} (.npy)", type="filepath", height=100)
    return gradio.Textbox(label=name, placeholder="same format as --given")


def _sounds(model: Any) -> list[str]:
    """Return the instances of which the page plays the first sample."""
    return [
        name
        for name in model.denoiser.modalities
        if name in model.generated and hasattr(model.modality(name), "sound")
    ]


def _answer(gradio: Any, model: Any, names: list[str]) -> Callable[..., Any]:
    """Return what draws the samples for the values of all fields."""
    from mmdiff_ray.evaluation.gallery import parse_given, picture

    def answer(*values: Any) -> tuple[Any, ...]:
        *fields, num, guidance, readout, seed = values
        try:
            texts = [f"{name}={value}" for name, value in zip(names, fields, strict=True) if value]
            given = parse_given(model, texts)
            likely = READOUTS[readout]
            likely = model.is_likely(list(given)) if likely is None else likely
            count = 1 if likely else int(num)
            samples = model.draw(given, count, guidance=float(guidance), seed=int(seed), likely=likely)
        except ConfigError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        notes = "".join(f"- {note}\n" for note in model.untrained(list(given), float(guidance)))
        played = [model.modality(name).sound(samples.data[name][0]) for name in _sounds(model)]
        return picture(model, samples, list(given), count), *played, notes

    return answer
