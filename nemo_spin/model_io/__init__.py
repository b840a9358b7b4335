"""Models in and out: checkpoint families, their weight stores, and tokenizers."""
