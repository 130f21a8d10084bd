"""Classes of texts: labelled rows, encoders with a head, how they train and are scored."""
