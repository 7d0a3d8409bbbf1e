"""Training in one or more processes: loss, optimizer, trainer and checkpoints. Independent of Ray."""
