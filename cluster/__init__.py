"""What runs on a laptop or a login node; it never imports torch, nor anything of `train`."""
