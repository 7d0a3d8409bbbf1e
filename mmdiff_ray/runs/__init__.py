"""What a run is: its folder, its lock, its checkpoints in storage, its records."""
