"""What a cluster has and gives me, and whether a job will fit: `make check`."""
