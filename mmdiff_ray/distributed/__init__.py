"""Everything that runs on Ray: the cluster, the stream of rows, workers, the launch and its display."""
