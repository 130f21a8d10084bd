"""The parts that the training scripts share; each module has one job."""
