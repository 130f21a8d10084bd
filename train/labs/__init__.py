"""The four labs."""
