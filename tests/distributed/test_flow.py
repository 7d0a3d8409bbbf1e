"""Running chunks: order, errors, what actors ask for, and noise."""

import os
import sys
from contextlib import closing

import numpy as np
import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.distributed import flow
from mmdiff_ray.distributed.flow import quiet_stderr, resources_per_call, run


def test_steps_run_in_order_in_this_process():
    assert list(run(lambda n: n + 1, [lambda n: n * 10, str], [1, 2, 3], workers=0)) == ["20", "30", "40"]


@pytest.mark.ray
def test_chunks_come_back_from_ray_in_order_and_unchanged(ray_cluster):
    chunks = [{"n": n, "nothing": None, "bytes": bytes([n])} for n in range(40)]
    done = run(lambda chunk: {**chunk, "square": chunk["n"] ** 2}, [lambda chunk: (chunk, "seen")], chunks, 2)
    assert list(done) == [({**chunk, "square": chunk["n"] ** 2}, "seen") for chunk in chunks]


@pytest.mark.ray
def test_users_mistake_in_an_actor_arrives_as_itself(ray_cluster):
    def complain(chunk):
        raise ConfigError("look: these weights do not fit")

    with pytest.raises(ConfigError) as caught, closing(run(lambda n: n, [complain], [1, 2], 1)) as stream:
        list(stream)
    assert type(caught.value) is ConfigError
    assert str(caught.value) == "look: these weights do not fit"


@pytest.mark.parametrize("nodes", [[1], [2], [16], [1, 1, 1, 1], [2, 2], [1, 7], [4, 4, 4]])
@pytest.mark.parametrize("actors", [1, 2, 3, 5, 30])
def test_a_task_finds_room_beside_the_actors_however_they_are_spread(nodes, actors):
    task, actor = (ask["num_cpus"] for ask in resources_per_call(sum(nodes), 0, len(nodes), actors))
    rng = np.random.default_rng(0)
    for _ in range(50):
        free = np.array(nodes, float)
        for _ in range(actors):
            free[rng.choice(np.flatnonzero(free >= actor - 1e-9))] -= actor
        assert free.max() >= task - 1e-9 > 0


@pytest.mark.parametrize(
    ("gpus", "actors", "share"), [(1, 1, 1), (1, 2, 0.5), (3, 4, 0.5), (8, 2, 1), (2, 5, 1 / 3)]
)
def test_actors_share_whole_gpus(gpus, actors, share):
    assert resources_per_call(8, gpus, 1, actors)[1]["num_gpus"] == pytest.approx(share)
    assert "num_gpus" not in resources_per_call(8, 0, 1, actors)[1]


def test_work_asks_for_cpus_where_the_cluster_has_none_yet(monkeypatch, capsys):
    """A task of no CPUs would run on the head, and no autoscaler would hear of it."""
    started = []
    head, node = {"Resources": {}, "Labels": {}}, {"Resources": {"CPU": 2.0}, "Labels": {"kind": "small"}}
    monkeypatch.setattr(flow, "fitting", lambda labels: [node] * len(started) if labels else [head])

    def start_one(bundles, labels, why):
        """Refuse more than a node of two CPUs."""
        if sum(bundle["CPU"] for bundle in bundles) <= 2:
            started.extend(labels)
        return bool(started)

    monkeypatch.setattr(flow, "start_nodes", start_one)
    assert flow._resources_per_call(4, {"kind": "small"}) == ({"num_cpus": 1.0}, {"num_cpus": 0.25})
    assert started == [{"kind": "small"}]
    monkeypatch.setattr(flow, "start_nodes", lambda bundles, labels, why: False)
    assert capsys.readouterr().out == ""
    assert (
        flow._resources_per_call(4, {})
        == resources_per_call(0, 0, 0, 4)
        == ({"num_cpus": 1.0}, {"num_cpus": 1.0})
    )
    told = "the work needs 1 CPU, the cluster has 0; it starts when a node with CPUs joins\n"
    assert capsys.readouterr().out == told


def test_noise_is_kept_off_the_terminal(capfd):
    with quiet_stderr():
        os.write(2, b"core_worker.cc: nothing to see\n")
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "after\n"


def test_noise_is_shown_where_a_build_fails(capfd):
    with pytest.raises(RuntimeError), quiet_stderr():
        os.write(2, b"a worker died of signal 11\n")
        raise RuntimeError
    assert "signal 11" in capfd.readouterr().err


def test_noise_is_not_shown_for_a_users_mistake(capfd):
    with pytest.raises(ConfigError), quiet_stderr():
        os.write(2, b"traceback\n")
        raise ConfigError("mend this")
    assert capfd.readouterr().err == ""
