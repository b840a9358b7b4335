"""What becomes of NeMo-Aligner's keys."""
