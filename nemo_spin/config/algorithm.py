"""`model.spin`: the settings of the algorithm."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_spin.config.settings import REQUIRED, section, setting

LOSS_TYPES = ("logistic", "hinge", "exponential", "correlation")
REJECTED_SELECTIONS = ("all", "best", "worst")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """`model.spin.sampling_params`: how the reference picks a token. temperature: of the first iteration."""

    use_greedy: bool = setting(False)
    """the most likely token; then leave temperature, top_k and top_p as they are here"""
    temperature: float = setting(1.0, above=0.0, per_iteration=True)
    """divides the logits: one number, or a list with one per iteration"""
    top_k: int = setting(0, minimum=0)
    """sample among the k most likely tokens; 0: off"""
    top_p: float = setting(1.0, above=0.0, maximum=1.0)
    """sample among the likeliest tokens that make up this probability; 1.0: off"""
    repetition_penalty: float = setting(1.0, above=0.0)
    """above 1 disfavours tokens that have occurred; 1.0: off"""
    end_strings: tuple[str, ...] = setting(())
    """texts that end a response, beside the end-of-sequence token"""


@dataclass(frozen=True, slots=True)
class LengthParams:
    """`model.spin.length_params`, in generated tokens per response."""

    max_length: int = setting(None, null=0, minimum=0)
    """most generated tokens per response; null or 0: what the context leaves after its prompt. NeMo-Aligner's
    ${int_div:${model.encoder_seq_length}, 2} works where that length is set"""
    min_length: int = setting(1, minimum=0)
    """fewest generated tokens per response"""


@dataclass(frozen=True, slots=True)
class GuardsConfig:
    """`model.spin.guards`: thresholds for warnings of a collapse; None switches one off."""

    empty: float | None = setting(0.01, above=0.0, maximum=1.0)
    """share of generated responses that are nothing but a stop token"""
    repeated: float | None = setting(0.05, above=0.0, maximum=1.0)
    """share that say the same over and over"""
    cut_off: float | None = setting(0.1, above=0.0, maximum=1.0)
    """share that run into the length limit"""
    entropy: float | None = setting(0.05, above=0.0)
    """least entropy of the policy's sampling, in nats per generated token"""
    falling_chosen: float | None = setting(0.5, above=0.0)
    """fall of the chosen reward over some dozens of steps, as a share of what the margin gains"""


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What of `model.spin` makes the loss of a pair; see `losses.spin_loss`."""

    loss_type: str = setting("logistic", choices=LOSS_TYPES)
    """of the margin (l in the paper's equation 4.7): logistic (the paper's), hinge, exponential or correlation (linear:
    it has no bound, so watch the rewards)"""
    label_smoothing: float = setting(0.0, minimum=0.0, below=0.5)
    """share of pairs whose human response may be the worse one"""
    sft_loss_weight: float = setting(0.0, minimum=0.0)
    """weight of the NLL of the human response, in nats per token, added to the loss: against falling log-probabilities
    of human responses; 0: none"""
    preference_average_log_probs: bool = setting(False)
    """a response counts with its mean log-probability per token instead of their sum; beta then has to be larger by
    about the length"""


@dataclass(frozen=True, slots=True)
class AlgorithmConfig:
    """`model.spin`: the algorithm.

    Of ref_policy_kl_penalty and temperature there are as many numbers as iterations; temperature takes the place of the
    one in `sampling_params`. Of replay_weights there are as many as replay_iterations, the last iteration's first.
    """

    ref_policy_kl_penalty: tuple[float, ...] = setting((0.1,), null=REQUIRED, above=0.0, per_iteration=True)
    """beta: one number, or a list with one per iteration ([0.1, 0.5, 1.0])"""
    reset_optimizer: bool = setting(True, name="reset_optimizer_each_iteration")
    """a fresh optimizer and schedule in each iteration; false: both run on"""
    refresh_reference: bool = setting(True)
    """after each iteration the policy becomes the reference; false: the reference stays the SFT model, as in DPO, to
    see what self-play adds"""
    replay_iterations: int = setting(1, minimum=0)
    """from the second iteration on, also train on the pairs of the previous N iterations, re-scored with the current
    reference (the paper: 1); 0: off"""
    replay_weights: tuple[float, ...] = setting(None, null=(1.0,))
    """passes over those pairs in an epoch, the last iteration's first ([1, 0.5]: half of the pairs of the one before
    it); null: one over each"""
    loss: LossConfig = section("model.spin", default_factory=LossConfig)
    held_out_rollouts: int = setting(0, minimum=0)
    """validation examples that the reference answers at each iteration's start, for val/loss and val/rewards/*: SPIN's
    loss and accuracy on held-out data; 0: none"""
    first_rollouts_from_data: bool = setting(False)
    """the first iteration uses the responses in the data ({"real", "generated"} records) and generates none"""
    num_generations: int = setting(1, minimum=1)
    """responses of the reference to each prompt, above 1 against noise"""
    rejected_selection: str = setting("all", choices=REJECTED_SELECTIONS)
    """which of them make pairs: all; best or worst: the one to which the reference gives the highest or the lowest
    log-probability"""
    rollout_batch_size: int | None = setting(None, minimum=1)
    """most sequences decoded at once per data-parallel rank. With pipeline parallelism, PP + 1 such groups run
    concurrently. null: whatever fits in the KV cache, up to 256"""
    kv_cache_gib: float | None = setting(None, above=0.0)
    """KV-cache limit per device in GiB. When it is full, the newest sequences are preempted and recomputed later. null:
    most of the free memory"""
    generation_engine: str = setting("auto", choices=("auto", "nemo_spin", "megatron"))
    """nemo_spin: this package's; megatron: megatron-core's dynamic engine, which makes the same responses and needs
    flash-attn; auto: nemo_spin, which is the faster one on a CPU (megatron has not been measured on a GPU)"""
    rollout_window: int | None = setting(None, minimum=1)
    """pairs whose responses are generated at a time, a multiple of global_batch_size; null: all of an iteration before
    its first step, with no second copy of the model"""
    log_prob_forward_micro_batch_size: int = setting(1, minimum=1)
    """pairs in a forward pass for the reference's log-probabilities"""
    sampling_params: SamplingParams = section("model.spin.sampling_params", default_factory=SamplingParams)
    length_params: LengthParams = section("model.spin.length_params", default_factory=LengthParams)
    guards: GuardsConfig = section("model.spin.guards", default_factory=GuardsConfig)
    """thresholds for warnings of a collapse; null turns one off"""
    temperature: tuple[float, ...] = (1.0,)

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
