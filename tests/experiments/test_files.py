from pathlib import Path

import pytest

from mmdiff_ray.experiments.files import beside, result_of


@pytest.mark.parametrize("given", ["tables/small.v2", "tables/small.v2.json", "tables/small.v2.md"])
def test_a_result_is_named_as_such_or_by_its_table_or_page(given):
    assert beside(result_of(Path(given)), ".cells.zip") == Path("tables/small.v2.cells.zip")
