"""Retrieval: passages in pieces, their vectors, the index of these, and what is found."""
