"""Commands given on a laptop: the checkout is brought to the cluster, and they run there."""
