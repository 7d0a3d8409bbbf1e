"""The page of `mmdiff try`: what is given in its fields appears in its answer, and mistakes in one line."""

import functools
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mmdiff_ray.cli import main
from mmdiff_ray.cli.try_run import page
from mmdiff_ray.models.denoiser import build_denoiser
from mmdiff_ray.sampling.generator import Generator
from tests.modalities import tiny
from tests.sprites import PLAIN
from tests.test_ui import free_port

CHROMIUM = shutil.which("chromium")
NAMES = list(PLAIN["modalities"])


@pytest.fixture(scope="module")
def address(finished):
    port = free_port()
    command = [sys.executable, "-m", "mmdiff_ray.cli", "try", finished.folder.name, "--runs", finished.runs]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"page: http://127.0.0.1:{port} (Ctrl-C ends it)\n"
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    deadline = time.monotonic() + 120
    while True:
        try:
            return Client(address, verbose=False)
        except Exception:
            assert time.monotonic() < deadline
            time.sleep(0.5)


def answer(client, given, num=2, guidance=1, readout="sample"):
    """Return the picture and the notes for what is given, in the order of the fields."""
    picture, notes = client.predict(*given, num, guidance, readout, 0, api_name="/answer")
    path = picture["path"] if isinstance(picture, dict) else picture
    return np.asarray(Image.open(path).convert("RGB")), notes


@pytest.mark.slow
def test_everything_is_generated_from_noise_and_from_what_is_given(client):
    fields = [component for component in client.config["components"] if component["type"] == "dropdown"]
    assert [field["props"]["label"] for field in fields] == ["shape"]
    name = fields[0]["props"]["choices"][1][1]
    place = NAMES.index("shape")
    joint, _ = answer(client, [None] * len(NAMES))
    given = [name if number == place else None for number in range(len(NAMES))]
    followed, _ = answer(client, given)
    again, _ = answer(client, given)
    assert joint.std() > 5 and not np.array_equal(joint, followed) and np.array_equal(followed, again)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_shows_a_field_for_every_modality(address, client):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    page = subprocess.run([str(CHROMIUM), *options, address], capture_output=True, text=True, timeout=120)
    assert all(name in page.stdout for name in [*NAMES, "Generate"]), page.stdout[-2000:]


def test_texts_are_typed_and_sounds_are_given_as_files_and_played():
    pytest.importorskip("gradio", reason="pip install 'mmdiff-ray[try]'")
    tasks = {"draw": {"roles": {"pixels": "generated", "caption": "given", "sound": "generated"}}}
    config = tiny.config("evaluate.steps=2", plain={**tiny.EVERY, "tasks": tasks})
    model = Generator(config, build_denoiser(config))
    blocks = page(model, "every")
    kinds = {(block["type"], block["props"].get("label")) for block in blocks.config["components"]}
    assert {("textbox", "caption"), ("audio", "sound")} <= kinds
    (click,) = blocks.fns.values()
    given = [{"caption": "a bird"}.get(name) for name in model.denoiser.modalities]
    picture, (rate, samples), notes = click.fn(*given, 1, 1, "sample", 0)
    assert picture.width > 100 and notes == "" and rate == 16_000 and len(samples) == 3_200


def test_an_open_address_needs_a_password(capsys):
    assert main(["try", "some", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err == "mmdiff: --host 0.0.0.0 opens the page to others; add --password WORD\n"
