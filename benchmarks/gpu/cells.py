"""What is measured: the models of the speed part and the cells of the science part."""

from dataclasses import dataclass

SPEED = ("unet_small", "unet_base", "dit_base", "dit_xlarge")
"""Configurations of the speed part, in `configs/`."""


@dataclass(frozen=True)
class Cell:
    """One training of the science part.

    table, method: what it is compared as. experiment, model: whose configuration it trains with, where that
    has another name. annotated: share of the rows that have masks. annotated_only: whether it trains on those
    rows alone.
    """

    table: str
    method: str
    experiment: str = ""
    annotated: float = 1.0
    annotated_only: bool = False

    @property
    def name(self) -> str:
        """Return the name of the cell's results."""
        return f"{self.table}-{self.method}"

    @property
    def config(self) -> str:
        """Return the name of its configuration in `configs/`."""
        return f"{self.experiment or self.table}-{self.method}"


CELLS = {
    cell.name: cell
    for cell in (
        Cell("masked_image", "ours"),
        Cell("masked_image", "restoration"),
        Cell("masked_image", "reconstruction"),
        Cell("image_mask", "ours"),
        Cell("image_mask", "masks"),
        Cell("few_annotations", "ours", "image_mask", annotated=0.1),
        Cell("few_annotations", "masks", "image_mask", annotated=0.1, annotated_only=True),
    )
}
