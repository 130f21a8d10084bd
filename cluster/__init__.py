"""What runs on a laptop or a login node; it never imports torch, or anything from `train`."""
