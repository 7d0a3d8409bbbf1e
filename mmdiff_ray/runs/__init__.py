"""Training runs: the job, its folder and lock, its MLflow records and description."""
