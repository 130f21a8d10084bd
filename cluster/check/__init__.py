"""What a cluster has and what I may use, and whether a job will fit: `make check`."""
