"""What runs on the nodes of a job, in its own container: attempt, preflight, launcher."""
