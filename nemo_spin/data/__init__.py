"""From a data file to batches of examples: reading, tokenizing, storing, ordering. Plain torch only."""
