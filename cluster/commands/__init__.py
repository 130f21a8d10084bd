"""A module for each command behind make's targets, and the parts that only commands use."""
