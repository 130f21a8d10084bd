"""Lab 4: retrieval with citations (docs/lab4-rag.md). Start with script.py."""
