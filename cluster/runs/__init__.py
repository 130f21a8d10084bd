"""Run folders: where they are, the code that goes into them, and how their jobs ended."""
