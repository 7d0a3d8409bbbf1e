"""A user's own embeddings: which row gets which vector, and which files are refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.datasets.build import make_pipeline
from tests.datasets.test_folder import make, save
from tests.datasets.test_streamed import hub_table, tar_bytes
from tests.datasets.test_streamed import make as make_streamed

VECTORS = np.arange(1, 10).reshape(3, 3)
NAMES = ["x/a.png", "b", "gone.png"]


@pytest.fixture
def pictures(tmp_path):
    for name in ("x/a.png", "b.png", "c.png"):
        save(tmp_path / "in" / name)
    return tmp_path


def keys_file(folder, suffix: str) -> str:
    """Write the names to a file of this kind, and return its path."""
    file, rows = folder / f"keys{suffix}", [{"file_name": name} for name in NAMES]
    texts = {
        ".txt": "\n".join(NAMES),
        ".json": json.dumps(NAMES),
        ".csv": "n;path\n" + "\n".join(f"{index};{name}" for index, name in enumerate(NAMES)),
        ".jsonl": "\n".join(map(json.dumps, rows)),
    }
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text(texts[suffix])
    return str(file)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv", ".jsonl", ".parquet", ".npz"])
def test_rows_get_the_vectors_of_their_names(pictures, suffix, kind):
    np.save(pictures / "v.npy", VECTORS.astype(kind))
    np.savez(pictures / "v.npz", vectors=VECTORS.astype(kind), names=np.array(NAMES))
    own = f"{pictures}/v.npz" if suffix == ".npz" else f"{pictures}/v.npy,{keys_file(pictures, suffix)}"
    built, rows = make(pictures / "in", pictures / "set", embeddings=f"look={own}")
    entry = built.manifest.columns["look"]
    assert (entry["kind"], entry["dim"], entry["present"]) == ("embedding", 3, 2)
    assert entry["codec"].startswith("v.np")
    assert rows["x/a.png"]["look"].tolist() == [1, 2, 3] and rows["b.png"]["look"].tolist() == [4, 5, 6]
    assert rows["c.png"]["look"] is None
    assert built.notes == ["look: 1 of 3 names are no row's: gone.png"]


@pytest.mark.parametrize(
    ("vectors", "names", "message"),
    [
        (VECTORS[:2].astype("f4"), NAMES, "holds 2 vectors for 3 names"),
        (VECTORS, NAMES, r"holds int64 of shape \(3, 3\), want floats"),
        (np.ones(3, "f4"), NAMES, r"holds float32 of shape \(3,\)"),
        (np.float32([[1], [np.nan], [1]]), NAMES, "the vector of 'b' is 0 or not finite"),
        (np.float16([[1], [1], [0]]), NAMES, "the vector of 'gone.png' is 0 or not finite"),
        (np.ones((3, 2), "f4"), ["a", "b", "b"], "1 of the names come twice"),
        (None, NAMES, r"embeddings: .*v\.npy cannot be read"),
        (np.ones((1, 2), "f4"), [["a"]], "is no JSON list of names"),
    ],
)
def test_other_files_are_refused_in_one_line(pictures, vectors, names, message):
    if vectors is None:
        (pictures / "v.npy").write_bytes(b"none")
    else:
        np.save(pictures / "v.npy", vectors)
    (pictures / "keys.json").write_text(json.dumps(names))
    own = f"look={pictures}/v.npy,{pictures}/keys.json"
    with pytest.raises(ConfigError, match=message) as error:
        make_pipeline("folder", {"source": str(pictures / "in"), "embeddings": own})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["v.npy,keys.txt", "look=v.npy", "look=v.npz,keys.txt", "look="])
def test_an_option_of_another_form_is_refused(pictures, text):
    with pytest.raises(ConfigError, match=r"embeddings: got .* want COLUMN=FILE\.npy,KEYS"):
        make_pipeline("folder", {"source": str(pictures / "in"), "embeddings": text})


def test_a_column_that_exists_is_refused(pictures):
    np.savez(pictures / "v.npz", vectors=VECTORS.astype("f4"), names=np.array(NAMES))
    options = {"source": str(pictures / "in"), "embeddings": f"label={pictures}/v.npz"}
    with pytest.raises(ConfigError, match="embeddings: the column label is taken; those are: pixels, label"):
        make_pipeline("folder", options).stages()


def test_streamed_rows_are_named_by_their_files_and_keys(tmp_path):
    (tmp_path / "in.tar").write_bytes(tar_bytes(range(4)))
    names = ["part/000001.jpg", "part/000002", "00000#000003"]
    np.savez(tmp_path / "v.npz", vectors=VECTORS.astype("f4"), names=np.array(names))
    own = {"embeddings": f"look={tmp_path}/v.npz"}
    built, rows = make_streamed("webdataset", str(tmp_path / "in.tar"), str(tmp_path / "tar"), **own)
    found = {row["text"]: row["look"] for row in rows.values()}
    assert found["number 0"] is None and not built.notes
    assert [found[f"number {index}"].tolist() for index in (1, 2, 3)] == VECTORS.tolist()

    table = hub_table(range(4))
    images = [{"bytes": one["bytes"], "path": f"{i}.jpg"} for i, one in enumerate(table["image"].to_pylist())]
    table = table.set_column(0, "image", pa.array(images))
    pq.write_table(table, tmp_path / "in.parquet")
    np.savez(
        tmp_path / "v.npz", vectors=VECTORS.astype("f4"), names=np.array(["0.jpg", "1", "00000-00000#000003"])
    )
    _, rows = make_streamed("parquet", str(tmp_path / "in.parquet"), str(tmp_path / "hub"), **own)
    found = {row["text"]: row["look"] for row in rows.values()}
    assert found["number 2"] is None
    assert [found[f"number {index}"].tolist() for index in (0, 1, 3)] == VECTORS.tolist()
    own["map"] = "pixels=image,file=caption:text"  # a column of that name is a column
    _, rows = make_streamed("parquet", str(tmp_path / "in.parquet"), str(tmp_path / "named"), **own)
    assert sorted(row["file"] for row in rows.values()) == [f"number {index}" for index in range(4)]
