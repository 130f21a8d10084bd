"""Lab 3: transfer learning (docs/lab3-imdb.md). script.py reads top to bottom; start there."""
