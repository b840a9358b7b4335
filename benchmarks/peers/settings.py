"""What both sides are told alike. Standard library only."""

from __future__ import annotations

SEED = 1
BETA = 0.1
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-5, (0.9, 0.999), 1e-8, 0.0, 1.0
PAIRS_PER_STEP = 8
"""Global batch and micro-batch: one optimizer step each."""
