"""megatron-core: set-up, the GPT model in a parallel layout, forward and backward, the optimizer. No NeMo here."""
