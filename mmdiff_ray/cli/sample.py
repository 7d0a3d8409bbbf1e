"""`mmdiff sample` and `mmdiff generate`: draw a few samples as pictures, or many as a data set."""

import argparse
import time
from pathlib import Path

from mmdiff_ray.cli.common import Commands, add_model, check_workers, command, model_of
from mmdiff_ray.config import ConfigError

LOW_AGREEMENT = 0.9
"""A note is printed where heads and code channels agree on a smaller share of cells."""


def add(commands: Commands) -> None:
    """Add `sample` and `generate`."""
    sample = command(
        commands,
        "sample",
        "draw samples from a trained model, any modality from any other",
        "mmdiff sample demo --given category='Food & Drink' --num 16",
        _sample,
        _check,
    )
    _add_arguments(sample, num=None)
    sample.add_argument(
        "--hole", help="for a given masked image: a picture, white is the hole (else alpha 0 is)"
    )
    sample.add_argument("--out", type=Path, help="a folder (default: samples/RUN-...)")
    generate = command(
        commands,
        "generate",
        "draw many samples into a data set of shards, by a pool of models on Ray; resumes where it stopped",
        "mmdiff generate demo --num 10000 --out data/generated --workers 2",
        _generate,
        _check_generate,
    )
    _add_arguments(generate, num=1000)
    generate.add_argument(
        "--rows",
        metavar="URI",
        help="complete the rows of this data set: --given then names instances that rows have",
    )
    generate.add_argument("--out", required=True, help="a folder, or any URI of pyarrow (s3://bucket/name)")
    generate.add_argument("--workers", type=int, default=1, help="models at once; 0: in this process")
    generate.add_argument("--force", action="store_true", help="replace a data set that is already there")


def _add_arguments(parser: argparse.ArgumentParser, num: int | None) -> None:
    """Add what both commands take. num: samples by default; None: one most likely answer or 16 samples."""
    add_model(parser)
    parser.add_argument(
        "--given", action="append", default=[], metavar="INSTANCE=VALUE", help="a name, or a file"
    )
    parser.add_argument("--num", type=int, default=num, help=f"default: {num or 16}")
    parser.add_argument("--sampler", help="ancestral, ddim or dpm2")
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--likely",
        action=argparse.BooleanOptionalAction,
        help="the most likely answer, in a few noiseless steps, or a sample (default: the task's readout)",
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="above 1: closer to what is given")
    parser.add_argument("--seed", type=int, default=0)


def _check(given: argparse.Namespace) -> None:
    from mmdiff_ray.evaluation.gallery import split_given
    from mmdiff_ray.sampling.generator import check_sampler

    for option in ("num", "steps"):
        value = getattr(given, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} ({value}) must be at least 1")
    if given.sampler is not None:
        check_sampler(given.sampler)
    if not given.guidance >= 0:
        raise ConfigError(f"--guidance ({given.guidance:g}) must be at least 0; 1 is none, above 1 more")
    for text in given.given if not getattr(given, "rows", None) else ():
        split_given(text)


def _check_generate(given: argparse.Namespace) -> None:
    check_workers(given)
    _check(given)
    named = [text for text in given.given if "=" not in text]
    if given.rows and len(named) < max(1, len(given.given)):
        raise ConfigError("--rows wants the instances that rows have, without values: --given pixels")


def _sample(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed.display import duration, make_console
    from mmdiff_ray.evaluation.gallery import free_folder, parse_given, write_gallery
    from mmdiff_ray.sampling.export import load_export

    console = make_console()
    if given.guidance != 1 and not given.given:
        console.print("note: --guidance changes nothing where nothing is given")
    found = model_of(given)
    model = load_export(found.where)
    rows = parse_given(model, given.given, given.hole)
    for sentence in model.untrained(list(rows), given.guidance):
        console.print(f"note: {sentence}")
    likely = model.is_likely(list(rows)) if given.likely is None else given.likely
    num = given.num or (1 if likely else 16)
    out = given.out or free_folder(Path("samples") / f"{found.name}-{'-'.join(rows) or 'joint'}")
    begun = time.monotonic()
    gallery = write_gallery(
        model,
        rows,
        num,
        out,
        steps=given.steps,
        sampler=given.sampler,
        guidance=given.guidance,
        seed=given.seed,
        likely=likely,
    )
    drawn = "the most likely answer" if likely else f"{num} sample{'s' if num > 1 else ''}"
    console.print(f"{drawn} in {duration(time.monotonic() - begun)}")
    for name, share in gallery.samples.agreement.items():
        if share < LOW_AGREEMENT:
            console.print(
                f"note: {name}: head and code channels agree on only {share:.0%} of cells; more --steps or "
                "more training help"
            )
    console.print(f"picture  {gallery.grid}")
    console.print(f"data     {gallery.folder} ({gallery.files} files, samples.json)")
    return 0


def _generate(given: argparse.Namespace) -> int:
    from mmdiff_ray.datasets.build import build

    options = {
        "model": model_of(given).where,
        **{key: getattr(given, key) for key in ("sampler", "steps", "guidance", "seed")},
    }
    if given.rows:
        likely = given.likely is None or given.likely
        options |= {"rows": given.rows, "given": ",".join(given.given), "likely": likely}
    else:
        options |= {"num": given.num, "given": ";".join(given.given), "likely": bool(given.likely)}
    pipeline = "predictions" if given.rows else "samples"
    built = build(pipeline, given.out, options, force=given.force, workers=given.workers)
    rows = sum(split.rows for split in built.manifest.splits.values())
    what = "completed rows" if given.rows else "samples"
    print(f"{given.out}: {rows:,} {what}. Look at them: mmdiff data inspect {given.out}")
    return 0
