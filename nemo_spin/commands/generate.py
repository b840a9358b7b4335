"""`nemo-spin generate`: responses of a checkpoint to prompts, made as training's rollouts are, written as they come."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from nemo_spin.commands.response_file import Found, check_output, find_responses, writing
from nemo_spin.commands.restoring import restored
from nemo_spin.config import LengthParams, SamplingParams
from nemo_spin.data.encoder import RecordEncoder
from nemo_spin.data.load_report import LoadReport
from nemo_spin.data.prompts import Prompt, read_prompts
from nemo_spin.generation.end_strings import text_of_response
from nemo_spin.generation.engine import Generator
from nemo_spin.generation.interface import GenerationRequest
from nemo_spin.megatron.architecture import check_layout
from nemo_spin.megatron.steps import response_logps
from nemo_spin.model import MegatronGPTSPINModel
from nemo_spin.model_io.fingerprint import fingerprint
from nemo_spin.model_io.open import open_checkpoint
from nemo_spin.model_io.tokenizers import check_tokenizer_fits, restore_tokenizer
from nemo_spin.runtime import collectives

# A chunk is generated, then scored, then written. In its end slots run empty; all of it is lost when the process ends.
_SLOTS_FILLED_PER_CHUNK = 8


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """What is asked for.

    model: precision, layout and tokenizer, as `MegatronGPTSPINModel.restore_from` takes them.
    seed, iteration: as in training, whose rollouts these are then. num_samples: responses to each prompt.
    rollout_batch_size: responses decoded at a time. micro_batch_size: responses per forward pass when they are scored.
    record_options: for `RecordEncoder`. on_bad_record: "error" or "skip". overwrite: begin anew, whatever is there.
    """

    checkpoint: str
    model: dict[str, Any]
    prompts: str
    output: str
    rollout_batch_size: int
    micro_batch_size: int
    num_samples: int
    seed: int
    iteration: int
    sampling: SamplingParams
    lengths: LengthParams
    record_options: dict[str, Any]
    on_bad_record: str
    overwrite: bool


@dataclass(frozen=True, slots=True)
class Request:
    """What there is to do.

    checkpoint: the one that is used; chosen says so where it is one of several. stop_ids: where a response ends, beside
    end strings. settings: what its responses depend on, beside the prompts.
    found: what an earlier run has left.
    """

    checkpoint: str
    chosen: str | None
    prompts: list[Prompt]
    report: LoadReport
    stop_ids: frozenset[int]
    settings: dict[str, Any]
    found: Found


def preflight(cfg: GenerateConfig) -> Request:
    """Read the checkpoint's description, the prompts and what is done already; load no weights, write nothing.

    Raises UserError for the first thing that cannot be used.
    """
    check_output(cfg.output, cfg.prompts)
    with open_checkpoint(cfg.checkpoint) as source:
        tokenizer = restore_tokenizer(source, cfg.model.get("tokenizer"))
        architecture = source.architecture(tokenizer.vocab_size)
    checkpoint = str(source.path)
    check_tokenizer_fits(tokenizer, architecture.vocab_rows, checkpoint)
    check_layout(
        architecture, cfg.model["tensor_model_parallel_size"], cfg.model["pipeline_model_parallel_size"], False
    )
    encoder = RecordEncoder(tokenizer, **cfg.record_options)
    prompts, report = read_prompts(cfg.prompts, encoder, architecture.max_sequence_length, cfg.on_bad_record)
    stop_ids = encoder.stop_ids(report.formats)
    settings = {
        "checkpoint": os.path.abspath(checkpoint),
        "checkpoint_fingerprint": fingerprint(checkpoint),
        "precision": cfg.model["precision"],
        "seed": cfg.seed,
        "iteration": cfg.iteration,
        "max_new_tokens": cfg.lengths.max_length,
        "min_new_tokens": cfg.lengths.min_length,
        "stop_ids": sorted(stop_ids),
        **dataclasses.asdict(cfg.sampling),
    }
    found = Found() if cfg.overwrite else find_responses(cfg.output, settings, prompts, cfg.num_samples)
    return Request(checkpoint, source.chosen, prompts, report, stop_ids, settings, found)


def generate(cfg: GenerateConfig) -> None:
    """Write {"id", "sample", "prompt_ids", "response_ids", "text", "finish_reason", "logp", "num_tokens"} for
    `num_samples` responses to each prompt, those left out that the output holds.

    text: without the stop token or end string. logp: of the whole response under the model, in nats, whatever the
    sampling. Every process of the run calls it; it begins with `preflight`. Raises UserError.
    """
    request = preflight(cfg)
    is_main = collectives.is_main()
    total, done = len(request.prompts) * cfg.num_samples, len(request.found.done)
    if is_main:
        if request.chosen:
            print(f"{cfg.checkpoint}: {request.chosen}", file=sys.stderr)
        print(request.report, file=sys.stderr)
        if done:
            print(f"{cfg.output}: {done} of {total} responses are there already", file=sys.stderr, flush=True)
    if done == total:
        return
    with restored(request.checkpoint, cfg.model) as model:
        respond(model, cfg, request, is_main)


def respond(model: MegatronGPTSPINModel, cfg: GenerateConfig, request: Request, is_main: bool) -> None:
    """Make what is missing, chunk by chunk; is_main: whether this process writes it. Every process calls it."""
    context_length = model.architecture.max_sequence_length
    rules = model.generation_rules(cfg.sampling, cfg.lengths.min_length, request.stop_ids, cfg.seed, context_length)
    generator = Generator(model.gpt, rules, slots=cfg.rollout_batch_size)
    batching = model.batching(cfg.micro_batch_size)
    # Nothing is written while another process may still be reading what is there.
    dist.barrier()
    file_or_none = writing(cfg.output, request.found, request.settings, request.prompts) if is_main else nullcontext()
    total, done = len(request.prompts) * cfg.num_samples, len(request.found.done)
    with file_or_none as file, tqdm(total=total, initial=done, unit=" responses", disable=not is_main) as bar:
        for chunk in _chunks(request, cfg):
            requests = [
                GenerationRequest(prompt.index, tuple(prompt.ids), cfg.lengths.max_length or context_length, sample)
                for prompt, sample in chunk
            ]
            responses = generator.generate(requests, cfg.iteration, bar.update)
            prompt_ids, response_ids = [r.prompt_ids for r in requests], [r.ids for r in responses]
            logps = response_logps(model.gpt, prompt_ids, response_ids, batching)
            if file is None:
                continue
            for (prompt, sample), response, logp in zip(chunk, responses, logps, strict=True):
                text = text_of_response(
                    response.ids,
                    response.finish_reason,
                    rules.stop_ids,
                    cfg.sampling.end_strings,
                    model.tokenizer,
                )
                file.append(
                    {
                        "id": prompt.id,
                        "sample": sample,
                        "prompt_ids": list(prompt.ids),
                        "response_ids": list(response.ids),
                        "text": text,
                        "finish_reason": response.finish_reason,
                        "logp": float(logp.double().sum()),
                        "num_tokens": len(response.ids),
                    }
                )


def _chunks(request: Request, cfg: GenerateConfig) -> Iterator[list[tuple[Prompt, int]]]:
    """(prompt, number of the sample) of every response that is still to be made."""
    missing = (
        (prompt, sample)
        for prompt in request.prompts
        for sample in range(cfg.num_samples)
        if (prompt.id, sample) not in request.found.done
    )
    while chunk := list(islice(missing, _SLOTS_FILLED_PER_CHUNK * cfg.rollout_batch_size)):
        yield chunk
