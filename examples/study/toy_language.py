"""A language with a known optimum: every response can be listed, so that distances to the data are computed exactly.

Three prompts of one token, responses of one to three letters out of three; each prompt has its own distribution over
the 39 of them. A tiny GPT learns a language of the same kind with other probabilities, or this one, and then plays
against itself. What Theorems 5.2 and 5.4 of the paper say of the end and of the way there can be looked up.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from experiments import Job

    from nemo_spin import MegatronGPTSPINModel

EOS, UNKNOWN, PROMPTS, LETTERS = "<eos>", "<unk>", ("P", "Q", "R"), ("a", "b", "c")
TOKENS = (EOS, UNKNOWN, *PROMPTS, *LETTERS)
LONGEST, CONTEXT, HELD_OUT = 3, 8, 999
RESPONSES = [list(r) for n in range(1, LONGEST + 1) for r in itertools.product(LETTERS, repeat=n)]
OVERRIDES = (
    "trainer.spin.max_epochs=5",
    "model.optim.lr=2e-3",
    "model.optim.sched.min_lr=0",
    "model.optim.sched.warmup_steps=10",
    "model.optim.weight_decay=0",
    "model.spin.replay_iterations=0",
    f"model.spin.held_out_rollouts={HELD_OUT}",
    "model.global_batch_size=256",
    "model.micro_batch_size=256",
    "model.spin.rollout_batch_size=256",
    "model.spin.log_prob_forward_micro_batch_size=256",
    f"model.spin.length_params.max_length={CONTEXT - 1}",
    # an empty response is one like any other
    "model.spin.length_params.min_length=0",
)


def language(seed: int) -> torch.Tensor:
    """Probabilities of all responses to each prompt, from random tables of the next letter: fp64 [3, 39]."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in PROMPTS:
        tables: dict[tuple[str, ...], torch.Tensor] = {}
        for length in range(LONGEST + 1):
            for prefix in itertools.product(LETTERS, repeat=length):
                logits = 1.2 * torch.randn(len(LETTERS) + 1, generator=generator, dtype=torch.float64)
                if length == 0:
                    logits[-1] = -math.inf
                tables[prefix] = logits.log_softmax(-1)
        rows.append(torch.stack([_logp(tables, response) for response in RESPONSES]))
    return torch.stack(rows).exp()


def _logp(tables: dict[tuple[str, ...], torch.Tensor], response: Sequence[str]) -> torch.Tensor:
    total = sum(tables[tuple(response[:i])][LETTERS.index(letter)] for i, letter in enumerate(response))
    # after three letters nothing but the end can come
    return total if len(response) == LONGEST else total + tables[tuple(response)][-1]


def sample(probabilities: torch.Tensor, examples: int, seed: int) -> torch.Tensor:
    """Numbers of responses, equally many to each prompt: int64 [prompts, examples / prompts]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probabilities, examples // len(PROMPTS), replacement=True, generator=generator)


def write(path: Path, drawn: torch.Tensor) -> None:
    lines = [
        json.dumps({"prompt_ids": [TOKENS.index(prompt)], "response_ids": ids_of(RESPONSES[number])})
        for prompt, numbers in zip(PROMPTS, drawn.tolist(), strict=True)
        for number in numbers
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def ids_of(response: Sequence[str]) -> list[int]:
    return [*(TOKENS.index(letter) for letter in response), TOKENS.index(EOS)]


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS, UNKNOWN])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def log_probabilities(model: MegatronGPTSPINModel) -> torch.Tensor:
    """What the model gives to every response: fp64 [prompts, responses], by the package's scoring."""
    from nemo_spin.megatron.steps import response_logps

    prompts = [[TOKENS.index(prompt)] for prompt in PROMPTS for _ in RESPONSES]
    responses = [ids_of(response) for _ in PROMPTS for response in RESPONSES]
    logps = response_logps(model.gpt, prompts, responses, model.batching(512))
    return torch.stack([row.double().sum() for row in logps]).reshape(len(PROMPTS), -1)


def kl(probabilities: torch.Tensor, log_policy: torch.Tensor) -> float:
    """KL(p_data || policy), in nats per response, the mean over prompts."""
    return float((probabilities * (probabilities.log() - log_policy)).sum(-1).mean())


def floor(probabilities: torch.Tensor, drawn: torch.Tensor) -> float:
    """How near one comes by counting the same examples: the KL to their frequencies, half an example added to each."""
    counts = torch.stack([torch.bincount(row, minlength=len(RESPONSES)) for row in drawn]).double() + 0.5
    return kl(probabilities, (counts / counts.sum(-1, keepdim=True)).log())


def optimum(probabilities: torch.Tensor, log_policy: torch.Tensor, beta: float) -> torch.Tensor:
    """Log-probabilities of the policy at which an iteration from this one has its optimum, by Theorem 5.4:
    p^(1 - 1/beta) p_data^(1/beta)."""
    return ((1 - 1 / beta) * log_policy + probabilities.log() / beta).log_softmax(-1)


def make_start(directory: Path, probabilities: torch.Tensor, seed: int, steps: int, examples: int) -> Path:
    """SFT of a tiny GPT on samples of a language."""
    from megatron.core import tensor_parallel
    from omegaconf import OmegaConf
    from starting_models import FineTuning
    from tasks import SFT

    from nemo_spin import MegatronGPTSPINModel
    from nemo_spin.config import DatasetConfig
    from nemo_spin.data.dataset import load_dataset
    from nemo_spin.megatron import setup

    if not setup.is_initialized():
        setup.initialize(1, 1, seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    config = {
        "mcore_gpt": True,
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "encoder_seq_length": CONTEXT,
        "max_position_embeddings": CONTEXT,
        "make_vocab_size_divisible_by": 8,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "precision": 32,
        "tokenizer": {"library": "huggingface", "type": str(directory / "tokenizer")},
    }
    model = MegatronGPTSPINModel(OmegaConf.create(config))
    write(directory / "sft.jsonl", sample(probabilities, examples, seed + 1000))
    cfg = DatasetConfig((str(directory / "sft.jsonl"),), cache_dir=str(directory / "cache"))
    data = load_dataset(cfg, model.tokenizer, CONTEXT)
    FineTuning(model, data, SFT(steps, 3e-3, 256, 0.0), seed).run(steps, 3e-3)
    path = directory / "start.nemo"
    model.save_to(path)
    return path


def run(
    job: Job, directory: Path, seconds: dict[str, float], sft_steps: int
) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Self-play in the language. Yields (iteration, step, figures); the first is the model that it starts from.

    job.shape: "far", from a model of another language, or "near", from one that has learned this one.
    """
    import playing

    from nemo_spin import MegatronGPTSPINModel

    directory.mkdir(parents=True)
    write_tokenizer(directory / "tokenizer")
    data = language(2 * job.seed)
    other = language(2 * job.seed + 1)
    started = time.perf_counter()
    start = make_start(directory, other if job.shape == "far" else data, job.seed, sft_steps, 4 * job.examples)
    seconds["SFT"] = time.perf_counter() - started
    drawn = sample(data, job.examples, job.seed)
    write(directory / "train.jsonl", drawn)
    write(directory / "held_out.jsonl", sample(data, HELD_OUT, job.seed + 2000))
    overrides = _overrides(job, directory)
    cfg, _ = playing.configuration([*overrides, f"pretrained_checkpoint.restore_from_path={start}"])
    log_start = log_probabilities(MegatronGPTSPINModel.restore_from(str(start)))
    lowest = floor(data, drawn)
    rows = [(-1, 0, _figures(data, log_start, log_start, lowest))]
    opponent = way = log_start

    def look(model: MegatronGPTSPINModel, iteration: int, step: int, logged: dict[str, float]) -> None:
        nonlocal opponent, way
        beta = cfg.spin.ref_policy_kl_penalty[iteration]
        way, aim = optimum(data, way, beta), optimum(data, opponent, beta)
        opponent = log_probabilities(model)
        figures = _figures(data, opponent, aim, lowest) | {"way": kl(data, way)}
        rows.append((iteration, step, figures | {f"train/{name}": value for name, value in logged.items()}))

    seconds |= playing.play(start, overrides, directory / "run", CONTEXT, directory / "cache", look)
    yield from rows


def _figures(data: torch.Tensor, log_policy: torch.Tensor, aim: torch.Tensor, lowest: float) -> dict[str, float]:
    """kl, kl_within: to the policy, and to the policy among the responses of the language. aim: the KL of what Theorem
    5.4 says of an iteration from the opponent there was; way: of all iterations from the start. mass: of the policy, on
    responses of the language."""
    return {
        "kl": kl(data, log_policy),
        "kl_within": kl(data, log_policy.log_softmax(-1)),
        "aim": kl(data, aim.log_softmax(-1)),
        "way": kl(data, aim.log_softmax(-1)),
        "floor": lowest,
        "mass": float(log_policy.exp().sum(-1).mean()),
    }


def _overrides(job: Any, directory: Path) -> tuple[str, ...]:
    return (
        f"model.data.train_ds.file_path={directory / 'train.jsonl'}",
        f"model.seed={job.seed}",
        f"model.data.validation_ds.file_path={directory / 'held_out.jsonl'}",
        *OVERRIDES,
        *job.overrides,
    )
