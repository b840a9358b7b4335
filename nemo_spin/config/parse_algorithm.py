"""`model.spin`: the algorithm, and how the reference generates."""

from __future__ import annotations

from nemo_spin.config.algorithm import (
    LOSS_TYPES,
    REJECTED_SELECTIONS,
    AlgorithmConfig,
    GuardsConfig,
    LengthParams,
    LossConfig,
    SamplingParams,
)
from nemo_spin.config.values import Section


def parse_algorithm(spin: Section, max_iterations: int, global_batch_size: int) -> AlgorithmConfig:
    """`model.spin`. Raises ConfigError."""
    window = spin.optional_integer("rollout_window", minimum=1)
    if window is not None and window % global_batch_size:
        raise spin.error("rollout_window", f"use null or a multiple of model.global_batch_size = {global_batch_size}")
    sampling = spin.section("sampling_params")
    sampling_params = parse_sampling(sampling, max_iterations)
    first_rollouts_from_data = spin.flag("first_rollouts_from_data", False)
    num_generations, selection = _generations(spin, sampling_params.use_greedy, first_rollouts_from_data)
    return AlgorithmConfig(
        ref_policy_kl_penalty=spin.per_iteration("ref_policy_kl_penalty", max_iterations),
        temperature=sampling.per_iteration("temperature", max_iterations, 1.0),
        num_generations=num_generations,
        rejected_selection=selection,
        replay_weights=_replay_weights(spin, max_iterations),
        refresh_reference=spin.flag("refresh_reference", True),
        loss=_loss(spin),
        rollout_batch_size=spin.optional_integer("rollout_batch_size", minimum=1),
        kv_cache_gib=spin.optional_number("kv_cache_gib", above=0.0),
        rollout_window=window,
        log_prob_forward_micro_batch_size=spin.integer("log_prob_forward_micro_batch_size", 1, minimum=1),
        reset_optimizer=spin.flag("reset_optimizer_each_iteration", True),
        held_out_rollouts=spin.integer("held_out_rollouts", 0, minimum=0),
        first_rollouts_from_data=first_rollouts_from_data,
        generation_engine=spin.choice("generation_engine", ("auto", "nemo_spin", "megatron"), "auto"),
        sampling_params=sampling_params,
        length_params=_lengths(spin.section("length_params")),
        guards=_guards(spin.section("guards")),
    )


def _generations(spin: Section, greedy: bool, from_data: bool) -> tuple[int, str]:
    """`num_generations` and `rejected_selection`."""
    number = spin.integer("num_generations", 1, minimum=1)
    selection = spin.choice("rejected_selection", REJECTED_SELECTIONS, "all")
    if number > 1 and greedy:
        raise spin.error("num_generations", "greedy decoding makes the same response each time; sample, or set it to 1")
    if number > 1 and from_data:
        raise spin.error(
            "num_generations", "the data bring one response to each prompt: set first_rollouts_from_data to false"
        )
    if number == 1 and selection != "all":
        raise spin.error("rejected_selection", "with num_generations = 1 there is nothing to choose from; use all")
    return number, selection


def _replay_weights(spin: Section, max_iterations: int) -> tuple[float, ...]:
    number = spin.integer("replay_iterations", 1, minimum=0)
    if number > max(1, max_iterations - 1):
        raise spin.error(
            "replay_iterations",
            f"the last of trainer.spin.max_iterations = {max_iterations} has {max_iterations - 1} before it; "
            "use at most so many",
        )
    if spin.get("replay_weights") is None:
        return (1.0,) * number
    weights = spin.numbers("replay_weights", ())
    if len(weights) != number or not all(weight > 0 for weight in weights):
        raise spin.error(
            "replay_weights", f"give a number above 0 for each of the replay_iterations = {number}, the last one first"
        )
    return weights


def _loss(spin: Section) -> LossConfig:
    smoothing = spin.number("label_smoothing", 0.0, minimum=0.0)
    if smoothing >= 0.5:
        raise spin.error(
            "label_smoothing", "use a number from 0 to below 0.5, from where on the preference is reversed"
        )
    return LossConfig(
        loss_type=spin.choice("loss_type", LOSS_TYPES, "logistic"),
        label_smoothing=smoothing,
        sft_loss_weight=spin.number("sft_loss_weight", 0.0, minimum=0.0),
        preference_average_log_probs=spin.flag("preference_average_log_probs", False),
    )


def _guards(section: Section) -> GuardsConfig:
    shares = {"empty": 0.01, "repeated": 0.05, "cut_off": 0.1}
    return GuardsConfig(
        **{key: section.number_or_off(key, default, above=0.0, maximum=1.0) for key, default in shares.items()},
        entropy=section.number_or_off("entropy", 0.05, above=0.0),
        falling_chosen=section.number_or_off("falling_chosen", 0.5, above=0.0),
    )


def parse_sampling(section: Section, max_iterations: int = 1) -> SamplingParams:
    """`model.spin.sampling_params`, with the first iteration's temperature. Raises ConfigError."""
    for key in ("add_BOS", "all_probs", "compute_logprob"):
        if section.flag(key, False):
            raise section.error(key, "only false is supported: a response continues the prompt as the data has it")
    temperatures = section.per_iteration("temperature", max_iterations, 1.0)
    sampling = SamplingParams(
        use_greedy=section.flag("use_greedy", False),
        temperature=temperatures[0],
        top_k=section.integer("top_k", 0, minimum=0),
        top_p=section.number("top_p", 1.0, above=0.0, maximum=1.0),
        repetition_penalty=section.number("repetition_penalty", 1.0, above=0.0),
        end_strings=section.strings("end_strings"),
    )
    if sampling.use_greedy:
        chosen = {"temperature": set(temperatures), "top_k": {sampling.top_k}, "top_p": {sampling.top_p}}
        for key, off in {"temperature": 1.0, "top_k": 0, "top_p": 1.0}.items():
            if chosen[key] != {off}:
                raise section.error(key, f"it contradicts use_greedy: true; set it to {off}, or use_greedy to false")
    return sampling


def _lengths(section: Section) -> LengthParams:
    lengths = LengthParams(
        max_length=section.optional_integer("max_length", minimum=0) or 0,
        min_length=section.integer("min_length", 0, minimum=0),
    )
    if 0 < lengths.max_length < lengths.min_length:
        raise section.error("min_length", f"it must not be above max_length = {lengths.max_length}")
    return lengths
