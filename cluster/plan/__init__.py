"""A job, resolved: sizes, settings, image and container, and the launch that results."""
