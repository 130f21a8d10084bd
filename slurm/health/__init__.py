"""The parts of slurm/preflight.py: the checks, the rendezvous of the nodes, and the verdict."""
