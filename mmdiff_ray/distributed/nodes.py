"""Nodes of a Ray cluster: find them by label, and have an autoscaler start more."""

from collections.abc import Mapping, Sequence

POLL_S = 5.0
"""Seconds between requests to the autoscaler; nodes take minutes to start."""
GROUP_LABEL = "ray.io/node-group"
"""Label that autoscalers and KubeRay set on the nodes that they start: the node type."""

Labels = Mapping[str, str]


def start_nodes(bundles: Sequence[Mapping[str, float]], labels: Sequence[Labels], why: str) -> bool:
    """Wait until the autoscaler has started nodes for all bundles at once; return False if it cannot.

    The autoscaler decides, since only it knows its limits. labels: label selector per bundle. why: what the
    cluster lacks, printed before the wait.
    """
    if not autoscales():
        return False
    from ray.util.placement_group import placement_group, remove_placement_group

    print(f"waiting for the cluster to start nodes: {why}", flush=True)
    group = placement_group(
        [dict(bundle) for bundle in bundles], bundle_label_selector=[dict(label) for label in labels]
    )
    try:
        while not group.wait(POLL_S):
            if _infeasible(group.id.hex()):
                return False
    finally:
        remove_placement_group(group)
    return True


def autoscales() -> bool:
    """Return whether the cluster has an autoscaler, version 2."""
    import ray

    if not any(node["Labels"].get(GROUP_LABEL) for node in alive()):
        return False
    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        return is_autoscaler_v2(fetch_from_server=True)
    except (
        ImportError,
        TypeError,
        AssertionError,
        ray.exceptions.RayError,
    ):  # private API: assume no autoscaler
        return False


def alive() -> list[dict]:
    """Return Ray's records of the live nodes."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def machines() -> set[str]:
    """Return the addresses of the machines with live nodes."""
    return {node["NodeManagerAddress"] for node in alive()}


def fitting(labels: Labels) -> list[dict]:
    """Return the live nodes with these labels."""
    return [node for node in alive() if labels.items() <= node["Labels"].items()]


def _infeasible(group: str) -> bool:
    """Return whether the autoscaler reports that it cannot start nodes for a placement group."""
    import ray

    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

        reply = GetClusterStatusReply()
        address = ray.get_runtime_context().gcs_address
        reply.ParseFromString(GcsClient(address).get_cluster_status(timeout_s=10))
        refused = reply.autoscaling_state.infeasible_gang_resource_requests
    except Exception:  # private API: without it, keep waiting
        return False
    return any(group in request.details for request in refused)
