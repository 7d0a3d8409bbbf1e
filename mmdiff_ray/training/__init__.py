"""Training in one process or many: the step, the trainer, checkpoints, and use of a trained model. No Ray
here."""
