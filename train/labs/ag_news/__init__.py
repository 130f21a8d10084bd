"""Lab 1: news by topic, with the Trainer (docs/lab1-ag-news.md). Start with script.py."""
