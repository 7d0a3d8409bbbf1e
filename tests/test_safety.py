"""Files of others run no code, reach no file outside their folder, and take no memory that they declare."""

import ast
import io
import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from mmdiff_ray.cli import main, make_parser
from mmdiff_ray.config import CheckpointConfig, ConfigError, RunError, load_saved
from mmdiff_ray.data.manifest import read_manifest
from mmdiff_ray.data.plan import Piece, Window
from mmdiff_ray.data.schema import make_column
from mmdiff_ray.datasets.build import build
from mmdiff_ray.datasets.webdataset import _decoded
from mmdiff_ray.distributed import local_cluster
from mmdiff_ray.evaluation import weights
from mmdiff_ray.evaluation.requests import cached
from mmdiff_ray.experiments.archive import archive_file, unpack
from mmdiff_ray.experiments.loading import load_experiment
from mmdiff_ray.sampling.export import load_export
from mmdiff_ray.storage.filesystem import is_inside
from mmdiff_ray.storage.mirror import Mirror
from mmdiff_ray.training.checkpoint import CheckpointStore, complete, restore
from tests import sprites as tiny
from tests.data import samples

ROOT = Path(__file__).parents[1]


class Planted:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def planted(tmp_path):
    """An object whose pickle runs code, which shows if it ran; none may."""
    mark = tmp_path / "it_ran"
    yield Planted(mark)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Planted(mark)))  # it would have
    assert mark.exists()


# --- pickles -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(sprites):
    trainer = tiny.trainer(tiny.job(sprites))
    trainer.advance(tiny.batches(tiny.job(sprites)), 16)
    return trainer


@pytest.fixture
def checkpoint(trained, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    store.save(trained, {})
    store.wait()
    return complete(tmp_path / "checkpoints")[0]


def test_a_pickle_in_the_metadata_of_a_checkpoint_is_refused(trained, checkpoint, planted):
    restore(trained, checkpoint)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = planted
    for content in (pickle.dumps(metadata), pickle.dumps(planted)):
        (checkpoint / ".metadata").write_bytes(content)
        with pytest.raises(RunError, match=r"it contains \w+\.mkdir, which checkpoints never use; remove it"):
            restore(trained, checkpoint)


def test_a_checkpoint_that_is_cut_short_or_names_other_files_is_refused(trained, checkpoint):
    sound = (checkpoint / ".metadata").read_bytes()
    outside = pickle.loads(sound)
    for place in outside.storage_data.values():
        place.relative_path = "../../x"
    for content, reason in ((sound[:-9], ""), (b"", ""), (pickle.dumps(outside), "names '../../x'")):
        (checkpoint / ".metadata").write_bytes(content)
        with pytest.raises(RunError, match=f"cannot load the checkpoint .*{reason}"):
            restore(trained, checkpoint)
    (checkpoint / ".metadata").write_bytes(sound)
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(b"")
    with pytest.raises(RunError, match="cannot load the checkpoint"):
        restore(trained, checkpoint)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_pickle_among_the_values_of_a_checkpoint_is_refused(planted, tmp_path):
    from mmdiff_ray.training.checkpoint_reader import load_files

    dcp.save({"lr": planted, "x": torch.ones(2)}, checkpoint_id=str(tmp_path / "one"), no_dist=True)
    with pytest.raises(RunError, match=r"cannot load the checkpoint .*eights"):
        load_files({"lr": 0.5, "x": torch.zeros(2)}, tmp_path / "one", no_dist=True)


def torch_bytes(value) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def npy_bytes(value) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([value], object), allow_pickle=True)
    return sink.getvalue()


def test_a_pickle_in_a_vector_is_refused(planted, tmp_path):
    (tmp_path / "x.npy").write_bytes(npy_bytes(planted))
    with pytest.raises(ConfigError, match="cannot read an embedding"):
        samples.modalities()["look"].parse(str(tmp_path / "x.npy"))
    assert _decoded("npy", npy_bytes(planted)) == {}


def test_a_pickle_in_cached_samples_is_refused(planted, tmp_path):
    (tmp_path / "joint-000000000.pt").write_bytes(torch_bytes({"data": planted}))
    with pytest.raises(RunError, match=r"joint-000000000\.pt has no valid samples"):
        list(cached(tmp_path, lambda name, requests: iter(()))("joint", [SimpleNamespace(start=0)]))


def test_a_pickle_in_cached_weights_is_refused(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / weights.SOURCES["alex"].hub).write_bytes(torch_bytes({"features.0": planted}))
    with pytest.raises(ConfigError, match="has no valid weights"):
        weights.convolutions("alex")


def test_a_pickle_in_an_export_is_refused(planted, sprites, tmp_path):
    from mmdiff_ray.sampling.export import save_export

    job = tiny.job(sprites)
    save_export(tmp_path / "export", job.config, job.denoiser(), {})
    assert load_export(tmp_path / "export")
    (tmp_path / "export/model.safetensors").write_bytes(torch_bytes(planted))
    with pytest.raises(ConfigError, match="cannot read a model"):
        load_export(tmp_path / "export")
    (tmp_path / "export/config.yaml").write_text(
        f"name: !!python/object/apply:os.mkdir ['{planted.folder}']\n"
    )
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_saved(tmp_path / "export/config.yaml")


def test_a_pickle_in_place_of_a_shard_is_bad_rows(planted, tmp_path):
    uri = str(tmp_path / "data")
    samples.write(uri, range(4), val_share=0)
    (shard,) = read_manifest(uri).splits["train"].shards
    Path(uri, shard.path).write_bytes(pickle.dumps(planted))
    rows = samples.reader([uri]).read(Window(0, 0, (Piece(shard.row_group(0), 0, 4),)))
    assert not rows["real"].any()


def test_only_what_travels_between_our_own_processes_is_pickled():
    pickles, loads = [], []
    for file in (ROOT / "mmdiff_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            keywords = {one.arg: ast.unparse(one.value) for one in getattr(node, "keywords", ())}
            if name in ("pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads"):
                pickles.append(file.relative_to(ROOT / "mmdiff_ray").as_posix())
            if name == "torch.load":
                loads.append(keywords.get("weights_only"))
            assert name not in ("torch.jit.load", "eval", "exec", "yaml.unsafe_load"), file
            assert keywords.get("allow_pickle", "False") == "False", file
    assert set(pickles) == {"distributed/flow.py", "distributed/stream.py"}
    assert len(loads) > 3 and set(loads) == {"True"}


# --- paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/../x", "/x", "", ".", "a//b", "a\\..\\x", "a\0"])
def test_what_leads_out_of_a_folder_is_not_inside_it(name):
    assert not is_inside(name) and is_inside("a/b.x") and is_inside("..a/b")


@pytest.mark.parametrize(
    "name", ["CELL/../../escaped", "/escaped", "CELL/measured/../../escaped.json", "CELL/x.py"]
)
def test_an_archive_of_cells_writes_cells_alone(name, tmp_path):
    experiment = load_experiment("masked_image", "small")
    key = experiment.cells()[0].key
    with zipfile.ZipFile(archive_file(tmp_path / "table"), "w") as archive:
        archive.writestr(name.replace("CELL", key), "x")
        archive.writestr(f"{key}/export/facts.json", "{}")
    with pytest.raises(ConfigError, match=r"table\.cells\.zip is not an archive of cells: unexpected entry"):
        unpack(experiment, tmp_path / "runs", tmp_path / "table")
    assert not (tmp_path / "runs").exists() and not list(tmp_path.rglob("escaped*"))


def test_a_folder_in_storage_cannot_write_outside_its_copy(tmp_path):
    there = tmp_path / "there/export"
    there.mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (there / "files.json").write_text(json.dumps({"files": {"../../secret": 1}}))
    mirror = Mirror(f"file://{tmp_path}/there", tmp_path / "here")
    with pytest.raises(RunError, match=r"contains '../../secret', a path outside"):
        mirror.fetch_folder("export")
    assert not list((tmp_path / "here").glob("export*"))


# --- bombs -------------------------------------------------------------------------------------------------


def bomb(mode: int, side: int = 60_000) -> bytes:
    """Return a small PNG that declares many pixels. mode: 2 is RGB, 0 grey."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, mode, 0, 0, 0])
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "mode"), [("image", 2), ("mask", 0)])
def test_a_picture_that_declares_more_pixels_than_a_limit_is_refused(kind, mode, tmp_path):
    column = make_column("x", {"kind": kind, "names": ["a", "b"]} if kind == "mask" else {"kind": kind})
    with pytest.raises(ConfigError, match="want a PNG of 1 to 178,956,970 pixels, got 60000 x 60000"):
        column.accept(bomb(mode))
    (tmp_path / "x.png").write_bytes(bomb(mode))
    modality = samples.modalities()["pixels" if kind == "image" else "alpha"]
    with pytest.raises(ConfigError, match="DecompressionBombError"):
        modality.parse(str(tmp_path / "x.png"))


def test_bombs_in_a_folder_cost_their_rows_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/bomb.png").write_bytes(bomb(2))
    (tmp_path / "photos/fine.png").write_bytes(samples.png(np.zeros((9, 9, 3), np.uint8)))
    options = {"source": str(tmp_path / "photos"), "size": "8", "bad_limit": "1", "val_share": 0}
    built = build("folder", str(tmp_path / "out"), options, workers=0, progress=False)
    assert built.written == 1 and "DecompressionBombError" in built.bad["bomb.png"]


# --- servers and secrets -----------------------------------------------------------------------------------


def test_servers_listen_on_this_machine_alone_unless_told_otherwise():
    assert make_parser().parse_args(["ui"]).host == local_cluster.HOST == "127.0.0.1"


SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "planted+secret/key",
    "MLFLOW_TRACKING_PASSWORD": "planted-password",
    "MLFLOW_TRACKING_TOKEN": "planted-token",
    "HF_TOKEN": "planted-hub-token",
}


def test_no_secret_is_in_anything_that_a_run_writes_or_says(sprites, tmp_path, monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    tiny.finish(tmp_path, sprites)
    planted = "planted-in-a-uri"
    for wrong in (
        f"tracking.uri=http://me:{planted}@127.0.0.1:1",
        f"data.sources=[{{uri: 's3://key:{planted}@bucket/x'}}]",
        f"runs=s3://key:{planted}@bucket/x",
        f"train.init=s3://key:{planted}@bucket/x.safetensors",
        f"evaluate.judge=s3://key:{planted}@bucket/x",
        f"plugins=[s3://key:{planted}@bucket]",
    ):
        assert main(["train", str(tmp_path / "tiny.yaml"), wrong]) in (1, 2), wrong
    said = capfd.readouterr()
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.name == "mlflow.db" for file in written) and len(written) > 30
    contents = {"stdout": said.out.encode(), "stderr": said.err.encode()}
    contents |= {str(file): file.read_bytes() for file in written}
    for secret in (*SECRETS.values(), planted):
        assert [name for name, content in contents.items() if secret.encode() in content] == [], secret
