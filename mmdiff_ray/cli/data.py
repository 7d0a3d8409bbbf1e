"""`mmdiff data`: build and inspect data sets, embed one value, train an autoencoder."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdiff_ray.cli.common import Commands, check_workers, command
from mmdiff_ray.config import ConfigError


class _DatasetHelp(argparse._HelpAction):
    """Help with the options of the data set named before `--help`, or of all data sets."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        from mmdiff_ray.datasets.options import describe

        parser.epilog = f"{describe(getattr(namespace, 'pipeline', None))}\n\n{parser.epilog}"
        super().__call__(parser, namespace, values, option_string)


def add(commands: Commands) -> None:
    """Add `data build`, `data inspect`, `data embed` and `data fit-codec`."""
    actions = commands.add_parser("data", help="build and inspect data sets").add_subparsers(
        required=True, metavar="ACTION"
    )
    _add_build(actions)
    inspect = command(
        actions, "inspect", "show what is in a data set", "mmdiff data inspect data/openmoji", _inspect
    )
    inspect.add_argument("uri", help="the folder or URI of the data set")
    inspect.add_argument(
        "--picture", type=Path, help="file for a picture of some rows (default: NAME.png in this folder)"
    )
    _add_embed(actions)
    _add_fit_codec(actions)


def _add_build(actions: Commands) -> None:
    build = command(
        actions,
        "build",
        "build a data set of shards from a raw source",
        "mmdiff data build folder --source photos --out data/photos --size 64",
        _build,
        _check_build,
        add_help=False,
    )
    build.add_argument(
        "-h", "--help", action=_DatasetHelp, help="show this help with the data set's options, and exit"
    )
    build.add_argument(
        "pipeline",
        help="folder, coco, cityscapes, parquet, webdataset, openmoji, sprites, digits, fashion_mnist, "
        "or your own",
    )
    build.add_argument("--out", required=True, help="folder or URI (s3://bucket/name) to write")
    build.add_argument("--force", action="store_true", help="replace an existing data set")
    build.add_argument(
        "--workers", type=int, default=1, help="Ray actors per embedding model; 0: without Ray"
    )
    build.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="run on Ray nodes with this label"
    )
    build.add_argument(
        "options", nargs="*", metavar="key=value", help="the data set's options; --key value works too"
    )


def _add_embed(actions: Commands) -> None:
    embed = command(
        actions,
        "embed",
        "embed a text or picture for `mmdiff sample --given`",
        "mmdiff data embed minilm 'a red cat' --out caption.npy",
        _embed,
        _check_embed,
    )
    embed.add_argument("embedder", help="minilm, efficientnet-lite0 or open_clip:MODEL[:weights]")
    embed.add_argument("value", help="a text, or an image file")
    embed.add_argument("--out", type=Path, required=True, help="the .npy file to write")


def _add_fit_codec(actions: Commands) -> None:
    fit = command(
        actions,
        "fit-codec",
        "train a small autoencoder on a data set's images, for `data build ... latent=FOLDER`",
        "mmdiff data fit-codec --source data/photos --out data/codec",
        _fit_codec,
        _check_fit_codec,
    )
    fit.add_argument("--source", required=True, help="the folder or URI of the data set")
    fit.add_argument("--out", type=Path, required=True, help="a new folder, in the layout of diffusers")
    fit.add_argument("--column", default="pixels", help="of the images")
    fit.add_argument("--channels", type=int, default=4, help="of the latents")
    fit.add_argument("--factor", type=int, default=8, help="pixels a side per cell of the latents")
    fit.add_argument("--width", type=int, default=32, help="channels inside")
    fit.add_argument("--samples", type=int, default=200_000, help="images seen")
    fit.add_argument("--batch", type=int, default=32)
    fit.add_argument("--learning-rate", type=float, default=1e-3)
    fit.add_argument(
        "--kl", type=float, default=0.0, help="weight of the KL term; above 0 makes an AutoencoderKL"
    )
    fit.add_argument("--lpips", type=float, default=1.0, help="weight of LPIPS beside L1; 0: none")
    fit.add_argument("--seed", type=int, default=0)


def _check_build(given: argparse.Namespace) -> None:
    from mmdiff_ray.datasets.build import check_options
    from mmdiff_ray.datasets.options import pipeline_options

    _labels(given.label)
    check_workers(given)
    check_options(given.pipeline, pipeline_options([*given.options, *given.extra]))


def _build(given: argparse.Namespace) -> int:
    from mmdiff_ray.datasets.build import build
    from mmdiff_ray.datasets.options import pipeline_options

    options = pipeline_options([*given.options, *given.extra])
    labels = _labels(given.label)
    built = build(given.pipeline, given.out, options, force=given.force, workers=given.workers, labels=labels)
    for key, reason in list(built.bad.items())[:10]:
        print(f"left out {key}: {reason}")
    for note in built.notes:
        print(note)
    splits = ", ".join(
        f"{split.rows:,} {name}"
        for name, split in built.manifest.splits.items()
        if split.rows or name != "test"
    )
    print(f"{given.out}: {splits} rows; inspect with: mmdiff data inspect {given.out}")
    return 0


def _labels(words: Sequence[str]) -> dict[str, str]:
    labels = {key: value for key, _, value in (word.partition("=") for word in words)}
    if not all(labels.values()):
        raise ConfigError(f"--label ({', '.join(words)}) must have the form KEY=VALUE")
    return labels


def _inspect(given: argparse.Namespace) -> int:
    from mmdiff_ray.datasets.inspect import inspect

    inspect(given.uri, given.picture)
    return 0


def _check_embed(given: argparse.Namespace) -> None:
    from mmdiff_ray.datasets.embedders import check_embedding

    check_embedding(given.embedder, given.out)


def _embed(given: argparse.Namespace) -> int:
    from mmdiff_ray.datasets.embedders import write_embedding

    dim = write_embedding(given.embedder, given.value, given.out)
    print(f"{given.out}: {dim} numbers")
    return 0


def _fit_of(given: argparse.Namespace) -> Any:
    from mmdiff_ray.datasets.fit_codec import Fit

    return Fit(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Fit)})


def _check_fit_codec(given: argparse.Namespace) -> None:
    _fit_of(given).check()


def _fit_codec(given: argparse.Namespace) -> int:
    from mmdiff_ray.datasets.fit_codec import fit_codec

    figures = fit_codec(_fit_of(given), given.out)
    shown = ", ".join(f"{name} {figures[name]:.3f}" for name in ("psnr", "l1", "lpips") if name in figures)
    print(f"{given.out}: {figures['rows']:.0f} held-out images come back with {shown}")
    return 0
