"""SSH in Python: what `make ssh` and the commands given on a laptop reach the cluster with."""
