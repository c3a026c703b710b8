"""SLURM: submitting a run, and how it stands."""
