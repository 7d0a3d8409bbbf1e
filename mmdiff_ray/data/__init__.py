"""The data sets: shards with a manifest, the plan that orders their rows, and the reading of batches."""
