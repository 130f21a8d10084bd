"""Text classification: labelled rows, the names of classes, and scores."""
