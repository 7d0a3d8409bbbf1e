"""The nodes of a cluster: those that an autoscaler could still start, and those with certain labels."""

from collections.abc import Mapping, Sequence

ASK_S = 5.0
"""Seconds between two questions to the autoscaler; a wait for nodes takes minutes."""
GROUP_LABEL = "ray.io/node-group"
"""The label by which a node says which kind of node it was started as, by an autoscaler or by KubeRay."""

Labels = Mapping[str, str]


def start_nodes(bundles: Sequence[Mapping[str, float]], labels: Sequence[Labels], why: str) -> bool:
    """Return whether the cluster can hold bundles of resources all at once; first wait for nodes to start.

    The autoscaler itself is asked, which knows its limits, and not waited for where it cannot start them.
    labels: of the node that each bundle is on. why: what is lacking, printed before the wait.
    """
    if not autoscales():
        return False
    from ray.util.placement_group import placement_group, remove_placement_group

    print(f"waiting for the cluster to start nodes: {why}", flush=True)
    group = placement_group(
        [dict(bundle) for bundle in bundles], bundle_label_selector=[dict(label) for label in labels]
    )
    try:
        while not group.wait(ASK_S):
            if _cannot_be_held(group.id.hex()):
                return False
    finally:
        remove_placement_group(group)
    return True


def autoscales() -> bool:
    """Return whether the cluster has an autoscaler that can be asked for nodes (Ray's second version)."""
    import ray

    if not any(node["Labels"].get(GROUP_LABEL) for node in alive()):
        return False
    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        return is_autoscaler_v2(fetch_from_server=True)
    except (ImportError, TypeError, AssertionError, ray.exceptions.RayError):  # no public name: do without
        return False


def alive() -> list[dict]:
    """Return what Ray tells of the nodes that are up now."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def machines() -> set[str]:
    """Return the addresses of the machines that nodes are up on now."""
    return {node["NodeManagerAddress"] for node in alive()}


def fitting(labels: Labels) -> list[dict]:
    """Return the nodes with these labels that are up now."""
    return [node for node in alive() if labels.items() <= node["Labels"].items()]


def _cannot_be_held(group: str) -> bool:
    """Return whether the autoscaler says that no nodes it may start could hold a placement group."""
    import ray

    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

        reply = GetClusterStatusReply()
        address = ray.get_runtime_context().gcs_address
        reply.ParseFromString(GcsClient(address).get_cluster_status(timeout_s=10))
        refused = reply.autoscaling_state.infeasible_gang_resource_requests
    except Exception:  # no public name: without it the wait goes on
        return False
    return any(group in request.details for request in refused)
