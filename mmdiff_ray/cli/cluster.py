"""`mmdiff cluster`: a Ray cluster of several nodes on this machine."""

import argparse

from mmdiff_ray.cli.common import Commands, command


def add(commands: Commands) -> None:
    """Add `cluster up`, `cluster down` and `cluster status`."""
    cluster = commands.add_parser(
        "cluster", help="start and stop a Ray cluster with several nodes on this machine"
    )
    actions = cluster.add_subparsers(required=True, metavar="ACTION")
    up = command(
        actions,
        "up",
        "start a head node and worker nodes on this machine; state is in .cluster/",
        "mmdiff cluster up --workers 2 --cpus 4",
        _up,
    )
    up.add_argument("--workers", type=int, default=2, help="number of worker nodes")
    up.add_argument("--cpus", type=int, default=4, help="logical CPUs per worker node")
    command(
        actions,
        "down",
        "stop the cluster of this folder; other Ray clusters continue",
        "mmdiff cluster down",
        _down,
    )
    command(
        actions,
        "status",
        "print whether the cluster of this folder is up",
        "mmdiff cluster status",
        _status,
    )


def _up(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed import local_cluster

    cluster = local_cluster.read()
    if cluster is not None and local_cluster.nodes(cluster) == 1 + cluster.workers:
        print("the cluster is already up")
    else:
        print("starting a head node and workers (about 30 s) ...", flush=True)
        cluster = local_cluster.up(given.workers, given.cpus)
        print("the cluster is up")
    print(local_cluster.describe(cluster))
    return 0


def _down(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed import local_cluster

    cluster = local_cluster.read()
    if cluster is not None and local_cluster.nodes(cluster):
        from mmdiff_ray.distributed.display import make_console
        from mmdiff_ray.distributed.jobs import stop_all

        stop_all(cluster, make_console())
    print("the cluster is down" if local_cluster.down() else "there is no cluster in this folder")
    return 0


def _status(given: argparse.Namespace) -> int:
    from mmdiff_ray.distributed import local_cluster

    cluster = local_cluster.read()
    if cluster is None:
        print("there is no cluster in this folder; start one with: mmdiff cluster up")
        return 1
    wanted, found = 1 + cluster.workers, local_cluster.nodes(cluster)
    if found < wanted:
        print(f"{found} of {wanted} nodes respond; restart with: mmdiff cluster down && mmdiff cluster up")
        return 1
    print(f"the cluster is up, with {found} nodes\n{local_cluster.describe(cluster)}")
    return 0
