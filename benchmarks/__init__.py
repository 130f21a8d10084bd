"""What Sluice costs and gains, as ratios against a peer in the same run; README.md explains."""
