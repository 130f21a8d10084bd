"""Commands given on a laptop: the checkout is copied to the cluster, and they run there."""
