"""The model laid out over ranks: hidden states between pipeline stages, logits and tokens within the group.

Everything that generation sends from rank to rank is here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


class Stage:
    """This rank's pipeline stage. Every rank of the model-parallel group makes the same calls in the same order."""

    def __init__(self, model: GPTModel) -> None:
        self.model = model
        self._tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self._pp_size = parallel_state.get_pipeline_model_parallel_world_size()
        # Ranks of the group are ordered by stage, then by tensor-parallel rank.
        group = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        self._sampling_rank = group[(self._pp_size - 1) * self._tp_size]

    @property
    def samples(self) -> bool:
        """Whether this rank is the one of its group that has all logits: the first of the last stage."""
        return dist.get_rank() == self._sampling_rank

    def forward(self, tokens: Tensor, positions: Tensor, rotary: Tensor | None, last: Tensor | None) -> Tensor | None:
        """One pass through all stages.

        tokens, positions: [b, s] int64. rotary: [s, 1 or b, 1, d] angles, None without rotary embedding.
        last: [b] int64, the column of each row whose logits are wanted; None where s is 1.
        Returns the logits [b, padded_vocab_rows] on the rank that `samples`, elsewhere None.
        """
        model = self.model
        hidden = None
        if model.pre_process:
            hidden = model.embedding(input_ids=tokens, position_ids=positions)
        else:
            model.decoder.set_input_tensor(self._receive(tokens.shape[1], tokens.shape[0], tokens.device))
        hidden = model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        if not model.post_process:
            self._send(hidden)
            return None
        if last is not None:
            hidden = hidden[last, torch.arange(len(last), device=last.device)][None]
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        logits, _ = model.output_layer(hidden, weight=weight)
        return self._gather(logits[0])

    def agree(self, ids: Tensor | None, count: int, device: torch.device) -> list[int]:
        """Give the sampled tokens to every rank of the group. ids: [count] int64 where `samples`, elsewhere None."""
        if ids is None:
            ids = torch.empty(count, dtype=torch.int64, device=device)
        if self._tp_size * self._pp_size > 1:
            dist.broadcast(ids, self._sampling_rank, group=parallel_state.get_model_parallel_group())
        return ids.tolist()

    def _receive(self, length: int, batch: int, device: torch.device) -> Tensor:
        config = self.model.config
        hidden = torch.empty(length, batch, config.hidden_size, dtype=config.pipeline_dtype, device=device)
        source = parallel_state.get_pipeline_model_parallel_prev_rank()
        dist.recv(hidden, source, group=parallel_state.get_pipeline_model_parallel_group())
        return hidden

    def _send(self, hidden: Tensor) -> None:
        destination = parallel_state.get_pipeline_model_parallel_next_rank()
        dist.send(hidden.contiguous(), destination, group=parallel_state.get_pipeline_model_parallel_group())

    def _gather(self, logits: Tensor) -> Tensor | None:
        """[b, rows / tp] of each tensor-parallel rank -> [b, rows] on the first of them."""
        if self._tp_size == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self._tp_size)] if self.samples else None
        dist.gather(logits.contiguous(), parts, self._sampling_rank, parallel_state.get_tensor_model_parallel_group())
        return torch.cat(parts, dim=-1) if parts else None
