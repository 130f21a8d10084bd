"""Slurm's commands, and their answers as plain values."""
