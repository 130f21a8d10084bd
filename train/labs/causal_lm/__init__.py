"""Lab 2: fine-tuning a language model (docs/lab2-causal-lm.md). Start with script.py."""
