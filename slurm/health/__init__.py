"""The parts of slurm/preflight.py: what it looks at, how the nodes meet, and the verdict."""
