"""Arguments of commands, run in this process."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import strategies as st

from mmdiff_ray.cli import main, parse
from tests.fuzz.cases import answer, fuzz, numbers, words

STARTED_NOWHERE = (
    ("data", "build", "sprites", "--out", "out", "--workers", "0", "count=3", "size=8"),
    ("data", "build", "digits", "--workers", "0", "limit=2", "--out", "out"),
    ("data", "build", "folder", "source=photos", "--workers", "0", "--out", "out"),
    ("data", "build", "parquet", "--source", "photos", "--workers", "0", "--out", "out"),
    ("data", "inspect", "nowhere"),
    ("train", "nowhere.yaml", "train.samples=3"),
    ("train", "--resume", "nowhere", "train.samples=3"),
    ("sample", "nowhere", "--given", "a=b", "--num", "3"),
    ("evaluate", "nowhere"),
    ("generate", "nowhere", "--out", "out", "--workers", "0"),
    ("experiment", "nowhere", "--preset", "smoke"),
    ("sweep", "nowhere.yaml"),
    ("cluster", "status"),
    ("ui", "--port", "0"),
)
CHECKED = (
    *STARTED_NOWHERE,
    ("data", "embed", "minilm", "text", "--out", "x.npy"),
    ("experiment", "masked_image", "--preset", "smoke", "--cells", "*-0"),
    ("sweep", "quickstart", "--dry-run"),
    ("sweep", "--resume", "nowhere", "budget.trials=3"),
    ("sweep", "report", "nowhere"),
    ("submit", "--", "train", "x.yaml"),
    ("jobs", "logs", "ID"),
    ("doctor",),
    ("sync",),
)
word = st.one_of(
    words, numbers.map(str), st.builds("{}={}".format, words, words), st.builds("--{}".format, words)
)
here = word.filter(
    lambda one: not one.startswith(("/", "~", "-C", "--w")) and "://" not in one and ".." not in one
)


@st.composite
def arguments(draw: st.DrawFn, commands: tuple[tuple[str, ...], ...]) -> list[str]:
    """Return the words of a command, with some replaced, left out or added behind the command itself."""
    chosen = list(draw(st.sampled_from(commands)))
    for _ in range(draw(st.integers(0, 3))):
        at, kind = draw(st.integers(1, len(chosen))), draw(st.sampled_from(("replace", "remove", "add")))
        kept = chosen[at:] if kind == "add" else chosen[at + 1 :]
        chosen = [*chosen[:at], *([] if kind == "remove" else [draw(here)]), *kept]
    return chosen


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@fuzz(20, given=arguments(STARTED_NOWHERE))
def test_a_command_ends_with_a_code_and_a_line(given, tmp_path):
    os.chdir(tmp_path)
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            code = main(given)
        except SystemExit as end:  # argparse's own way out
            assert end.code in (0, 2)
            return
    message = errors.getvalue()
    assert code in (0, 1, 2) and "unexpected" not in message, message
    assert not code or (message.startswith("mmdiff: ") and len(message.splitlines()) == 1) or out.getvalue()


@fuzz(20, given=arguments(CHECKED))
def test_arguments_are_refused_or_checked(given, tmp_path):
    os.chdir(tmp_path)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            parsed = parse(given)
        except SystemExit as end:
            assert end.code in (0, 2)
            return
        answer(lambda: parsed.check(parsed))
