"""The model laid out over ranks: hidden states from stage to stage, sampled tokens back from the last one.

Everything that generation sends from stage to stage is here. All of it goes from rank to rank within a pipeline group,
and between two ranks always in the order of the passes, hidden states before the tokens that come of them: so none
waits for another in a circle, also where a backend does what two ranks have to say to each other one after the other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


class Underway:
    """The tokens of one pass, which may still be on their way."""

    def __init__(self, ids: Tensor, works: list[tuple[dist.Work, Tensor]]) -> None:
        self._ids, self._works = ids, works

    def wait(self) -> Tensor:
        """[b] int64, when everything that the pass has sent or asked for has come."""
        for work, _ in self._works:
            work.wait()
        self._works = []
        return self._ids


class Stage:
    """This rank's pipeline stage. Every rank of the model-parallel group makes the same calls in the same order."""

    def __init__(self, model: GPTModel) -> None:
        self.model = model
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self._ranks = dist.get_process_group_ranks(self._group)
        self._place = self._ranks.index(dist.get_rank())
        self._sent: list[tuple[dist.Work, Tensor]] = []

    @property
    def count(self) -> int:
        """Pipeline stages."""
        return len(self._ranks)

    def forward(self, tokens: Tensor, positions: Tensor, rotary: Tensor | None, last: Tensor | None) -> Tensor | None:
        """One pass through this stage; what comes out goes to the next one.

        tokens, positions: [b, s] int64. rotary: [s, 1 or b, 1, d] angles, None without rotary embedding.
        last: [b] int64, the column of each row whose logits are wanted; None where s is 1.
        Returns the logits [b, padded_vocab_rows / tp] of this rank's vocabulary on the last stage, elsewhere None.
        """
        model = self.model
        hidden = None
        if model.pre_process:
            hidden = model.embedding(input_ids=tokens, position_ids=positions)
        else:
            model.decoder.set_input_tensor(self._receive(tokens.shape[1], tokens.shape[0], tokens.device))
        hidden = model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        if not model.post_process:
            self._send(hidden.contiguous(), self._ranks[self._place + 1])
            return None
        if last is not None:
            hidden = hidden[last, torch.arange(len(last), device=last.device)][None]
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        logits, _ = model.output_layer(hidden, weight=weight)
        return logits[0]

    def share(self, ids: Tensor | None, count: int, device: torch.device) -> Underway:
        """Begin to give the tokens of the last pass to every stage. ids: [count] int64 on the last one, else None."""
        if ids is not None:
            for rank in self._ranks[:-1]:
                self._send(ids, rank)
        else:
            ids = torch.empty(count, dtype=torch.int64, device=device)
            self._sent.append((dist.irecv(ids, self._ranks[-1], group=self._group), ids))
        underway, self._sent = Underway(ids, self._sent), []
        return underway

    def _receive(self, length: int, batch: int, device: torch.device) -> Tensor:
        config = self.model.config
        hidden = torch.empty(length, batch, config.hidden_size, dtype=config.pipeline_dtype, device=device)
        dist.recv(hidden, self._ranks[self._place - 1], group=self._group)
        return hidden

    def _send(self, tensor: Tensor, rank: int) -> None:
        self._sent.append((dist.isend(tensor, rank, group=self._group), tensor))
