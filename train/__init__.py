"""The training side: what runs on a compute node, in the image or in the virtual environment."""
