"""The part of the configuration that is the algorithm, `model.spin`: names, units and ranges."""

from __future__ import annotations

from dataclasses import dataclass

LOSS_TYPES = ("logistic", "hinge", "exponential", "correlation")
REJECTED_SELECTIONS = ("all", "best", "worst")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """`model.spin.sampling_params`: how the reference picks a token.

    use_greedy: the most likely token; then temperature, top_k and top_p have to be off (1, 0, 1).
    temperature: > 0, divides the logits.
    top_k: keeps the k most likely tokens; 0 is off.
    top_p: keeps the smallest set of tokens with at least this probability, in (0, 1]; 1 is off.
    repetition_penalty: > 0; 1 is off.
    end_strings: texts that end a response, beside the end-of-sequence token.
    """

    use_greedy: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    end_strings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LengthParams:
    """`model.spin.length_params`, in generated tokens per sample.

    max_length: at most so many; 0 for what the model's context leaves after each prompt.
    min_length: no stop token before so many, >= 0.
    """

    max_length: int
    min_length: int


@dataclass(frozen=True, slots=True)
class GuardsConfig:
    """`model.spin.guards`: from where on a collapse is warned of; None for never.

    empty, repeated, cut_off: share of an iteration's generated responses, in (0, 1], at which they are too many.
    entropy: nats per generated token, above 0, below which the policy's sampling is too certain.
    falling_chosen: how much the chosen reward falls, as a share of what the margin gains meanwhile, above 0.
    """

    empty: float | None
    repeated: float | None
    cut_off: float | None
    entropy: float | None
    falling_chosen: float | None


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What of `model.spin` makes the loss of a pair; see `losses.spin_loss`.

    loss_type: one of `LOSS_TYPES`, the l of the paper's equation 4.7.
    label_smoothing: in [0, 0.5): how often a human response is taken for the generated one.
    sft_loss_weight: >= 0, of the NLL of the human response, in nats per token, which is added.
    preference_average_log_probs: a response counts with its mean log-probability per token.
    """

    loss_type: str
    label_smoothing: float
    sft_loss_weight: float
    preference_average_log_probs: bool


@dataclass(frozen=True, slots=True)
class AlgorithmConfig:
    """`model.spin`: the algorithm.

    ref_policy_kl_penalty: beta of each iteration, > 0; as many as there are iterations.
    temperature: of each iteration, > 0, in place of the one of `sampling_params`; as many as there are iterations.
    num_generations: responses of the reference to each prompt, >= 1.
    rejected_selection: one of `REJECTED_SELECTIONS`: which of them make pairs; "best" and "worst" by the reference's
        log-probability.
    replay_weights: passes over the pairs that were generated one iteration ago, two ago, ... in an epoch, each > 0; as
        many as there are iterations whose pairs are trained on again.
    refresh_reference: the policy becomes the reference after each iteration; else the reference stays the SFT model.
    rollout_batch_size: sequences in one decoding pass of a data-parallel rank; None for as many as the KV cache holds.
    kv_cache_gib: GiB of keys and values on each device, at most; None for most of the memory that is free.
    rollout_window: pairs whose responses are generated at a time, a multiple of global_batch_size; None for all of an
        iteration, before its first step.
    log_prob_forward_micro_batch_size: pairs per forward pass when the reference's log-probabilities are computed.
    reset_optimizer: each iteration begins with a fresh optimizer and schedule; otherwise both run on.
    held_out_rollouts: examples of the validation data that the reference answers at each iteration's start, so that
        validation has SPIN's loss and accuracy too; 0 for validation by the NLL alone.
    first_rollouts_from_data: the first iteration uses the generated responses that the data have, and makes none.
    generation_engine: "nemo_spin", "megatron", or "auto", which is nemo_spin.
    """

    ref_policy_kl_penalty: tuple[float, ...]
    temperature: tuple[float, ...]
    num_generations: int
    rejected_selection: str
    replay_weights: tuple[float, ...]
    refresh_reference: bool
    loss: LossConfig
    rollout_batch_size: int | None
    kv_cache_gib: float | None
    rollout_window: int | None
    log_prob_forward_micro_batch_size: int
    reset_optimizer: bool
    held_out_rollouts: int
    first_rollouts_from_data: bool
    generation_engine: str
    sampling_params: SamplingParams
    length_params: LengthParams
    guards: GuardsConfig

    @property
    def replay_iterations(self) -> int:
        """Iterations before the present one whose pairs are trained on again, where there are so many."""
        return len(self.replay_weights)

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference is needed when the policy has moved on, so that a copy of it has to be kept."""
        return self.rollout_window is not None or not self.refresh_reference

    @property
    def pairs_per_example(self) -> int:
        """Pairs of an example in an epoch."""
        return self.num_generations if self.rejected_selection == "all" else 1

    def samples_itself(self, iteration: int) -> bool:
        """Whether the responses of an iteration are draws from the reference, and not its best guess or given."""
        return not (self.sampling_params.use_greedy or (self.first_rollouts_from_data and iteration == 0))
