"""The files of a result: all lie in one folder, and begin with its name."""

from pathlib import Path

ENDINGS = (".json", ".md")


def beside(out: Path, ending: str) -> Path:
    """Return the file of the result at `out` whose name ends so."""
    return out.with_name(f"{out.name}{ending}")


def result_of(file: Path) -> Path:
    """Return the place of a result that is named as such, or by its table or page."""
    return file.with_suffix("") if file.suffix in ENDINGS else file
