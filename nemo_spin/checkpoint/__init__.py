"""Reading NeMo 1 and NeMo 2 checkpoints, writing `.nemo` archives, saving and resuming runs."""
