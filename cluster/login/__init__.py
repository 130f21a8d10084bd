"""SSH in Python: how `make ssh` and the commands given on a laptop reach the cluster."""
