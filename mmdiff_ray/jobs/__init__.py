"""Jobs on a Ray cluster: package, submit, follow, stop; a cluster on this machine."""
