"""megatron-core: set-up, the GPT model in a parallel layout, forward and backward, the optimizer. No NeMo here."""

import warnings

# Without TransformerEngine and Apex, as on every CPU, importing megatron-core warns a dozen times that it goes without.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).* (is|are) not installed")
