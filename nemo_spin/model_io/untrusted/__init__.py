"""Readers of strangers' files: nothing that they name is imported or run."""
