"""What the benchmarks run: a Llama of 8 million parameters, the same one in transformers, and token ids for both."""

from __future__ import annotations

import torch
from cost_model import Shape
from llama import llama
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_spin.config import OptimConfig, SamplingParams, SchedConfig
from nemo_spin.data.example import Example
from nemo_spin.generation.engine import Generator
from nemo_spin.generation.rules import Rules
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.gpt import build_gpt
from nemo_spin.megatron.optimizer import Optimizer
from nemo_spin.megatron.steps import Batching
from nemo_spin.selfplay.pairs import Pair, Rollout

VOCAB_SIZE = 4096
SHAPE = Shape(layers=8, hidden=256, heads=8, groups=4, head_dim=32, ffn=704, vocab=VOCAB_SIZE)
PAD_ID = 0
PROMPT_TOKENS = 96
RESPONSE_TOKENS = 96
CONTEXT = PROMPT_TOKENS + RESPONSE_TOKENS
SEQUENCES = 8
"""Sequences in a training step, all in one micro-batch: half as many pairs."""

LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP = 1e-4, 0.1, (0.9, 0.98), 1e-8, 1.0


def architecture() -> Architecture:
    return llama(SHAPE, CONTEXT)


def in_transformers(architecture: Architecture, gpt: GPTModel) -> LlamaForCausalLM:
    """The same model, with the same weights, of transformers. `gpt` must be whole: one process."""
    transformer = architecture.transformer
    heads, groups = transformer["num_attention_heads"], transformer["num_query_groups"]
    ours = {name: value.detach() for name, value in gpt.state_dict().items() if isinstance(value, Tensor)}
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for i in range(transformer["num_layers"]):
        layer = {name: ours[f"decoder.layers.{i}.{name}.weight"] for name in _LAYER}
        # megatron-core keeps the heads of a query group together with its key and value.
        qkv = layer["self_attention.linear_qkv"].unflatten(0, (groups, heads // groups + 2, -1))
        query, key, value = (part.flatten(0, 2) for part in qkv.split([heads // groups, 1, 1], dim=1))
        gate, up = layer["mlp.linear_fc1"].chunk(2)
        modules = {
            "input_layernorm": layer["input_layernorm"],
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": layer["self_attention.linear_proj"],
            "post_attention_layernorm": layer["pre_mlp_layernorm"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer["mlp.linear_fc2"],
        }
        theirs |= {f"model.layers.{i}.{name}.weight": weight for name, weight in modules.items()}
    config = LlamaConfig(
        vocab_size=architecture.vocab_rows,
        hidden_size=transformer["hidden_size"],
        intermediate_size=transformer["ffn_hidden_size"],
        num_hidden_layers=transformer["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=architecture.max_sequence_length,
        rms_norm_eps=transformer["layernorm_epsilon"],
        rope_theta=architecture.rotary_base,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(theirs, strict=True)
    return model


_LAYER = (
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def policy(steps: int) -> tuple[GPTModel, Optimizer]:
    """Our model, and the optimizer of a run of so many steps. The process groups have to exist."""
    gpt = build_gpt(architecture(), "32")
    sched = SchedConfig(name="Constant", warmup_steps=0, constant_steps=0, min_lr=LEARNING_RATE)
    optim = OptimConfig("adamw", (LEARNING_RATE,), WEIGHT_DECAY, BETAS, EPS, sched)
    optimizer = Optimizer(gpt, optim, CLIP)
    optimizer.start(LEARNING_RATE, steps)
    return gpt, optimizer


def generator(gpt: GPTModel, slots: int) -> Generator:
    """Samples at temperature 1, and never stops before the budget: what is decoded has known lengths."""
    sampling = SamplingParams(
        use_greedy=False, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, end_strings=()
    )
    return Generator(gpt, Rules(sampling, VOCAB_SIZE, CONTEXT, seed=1), slots)


def batching(micro_batch_size: int) -> Batching:
    return Batching(VOCAB_SIZE, PAD_ID, micro_batch_size)


def random_ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, VOCAB_SIZE, (count,), generator=generator).tolist())


def examples(count: int) -> list[Example]:
    """Random prompts and responses of PROMPT_TOKENS and RESPONSE_TOKENS: nothing is padded."""
    return [Example(i, random_ids(PROMPT_TOKENS, 2 * i), random_ids(RESPONSE_TOKENS, 2 * i + 1)) for i in range(count)]


def as_pairs(data: list[Example], rollouts: list[Rollout]) -> list[Pair]:
    return [Pair.of(example, rollout) for example, rollout in zip(data, rollouts, strict=True)]


def as_sft(pairs: list[Pair]) -> list[Example]:
    """The sequences of the pairs, in their order within a SPIN micro-batch of all of them: all chosen, all rejected."""
    prompts = [pair.example.prompt_ids for pair in pairs] * 2
    responses = [pair.example.response_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    return [Example(i, *ids) for i, ids in enumerate(zip(prompts, responses, strict=True))]
