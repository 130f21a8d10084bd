"""Lab 5: fine-tuning a model on conversations (docs/lab5-chat.md). Start with script.py."""
