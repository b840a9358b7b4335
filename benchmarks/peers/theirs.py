"""The peers' side: transformers generates, TRL's DPOTrainer trains. Runs in the environment that has TRL.

Written as somebody who knows both would: left-padded prompts sorted by length, the batch size that is fastest here,
SDPA, the fused AdamW, no gradient checkpointing (TRL's default, which is slower), no saving, no progress bars.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import workloads
from peak import above_idle
from protocol import Answer, serve
from settings import BETA, BETAS, CLIP, EPS, LEARNING_RATE, PAIRS_PER_STEP, SEED, WEIGHT_DECAY
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from trl import DPOConfig, DPOTrainer
from workloads import WORKLOADS, Ids, Texts, Workload

_MODEL = sys.argv[1]
_THREADS = int(sys.argv[2])


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(_MODEL, dtype=torch.float32)


class Side:
    """One method for each command, as in ours.py."""

    def __init__(self) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(_MODEL)
        self._model: PreTrainedModel | None = None
        self._calls = itertools.count()

    def generate(self, name: str, data: str, batch: int) -> Answer:
        if self._model is None:
            self._model = load()
        torch.manual_seed(next(self._calls))
        start = time.perf_counter()
        responses, slots = self._generate(self._model, WORKLOADS[name], workloads.read(Path(data)).prompts, batch)
        seconds = time.perf_counter() - start
        tokens = sum(map(len, responses))
        return {"seconds": seconds, "tokens": tokens, "useful": tokens / slots}

    def _generate(
        self, model: PreTrainedModel, workload: Workload, prompts: list[Ids], batch: int
    ) -> tuple[list[Ids], int]:
        """The responses, with their EOS where they have one, and the number of slots that were decoded."""
        model.eval()
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=workload.max_new_tokens,
            pad_token_id=workloads.PAD_ID,
            eos_token_id=None if workload.equal else workloads.EOS_ID,
        )
        responses: dict[int, Ids] = {}
        slots = 0
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), batch):
            group = order[first : first + batch]
            padded = self._tokenizer.pad({"input_ids": [prompts[i] for i in group]}, return_tensors="pt")
            made = model.generate(**padded)[:, padded["input_ids"].shape[1] :]
            slots += made.numel()
            for i, ids in zip(group, made.tolist(), strict=True):
                ends = not workload.equal and workloads.EOS_ID in ids
                responses[i] = ids[: ids.index(workloads.EOS_ID) + 1] if ends else ids
        return [responses[i] for i in range(len(prompts))], slots

    def _text(self, ids: Ids) -> str:
        return "".join(f" {token}" for token in self._tokenizer.convert_ids_to_tokens(ids))

    def _dataset(self, texts: Texts) -> datasets.Dataset:
        """The pairs as TRL reads them: texts, which it tokenizes. `call` keeps its cache from knowing them."""
        call = next(self._calls)
        return datasets.Dataset.from_list(
            [
                {"prompt": self._text(p), "chosen": self._text(c), "rejected": self._text(r), "call": call}
                for p, c, r in zip(texts.prompts, texts.chosen, texts.rejected, strict=True)
            ]
        )

    def _trainer(self, model: PreTrainedModel, texts: Texts, precompute: bool, directory: str) -> DPOTrainer:
        arguments = DPOConfig(
            output_dir=directory,
            per_device_train_batch_size=PAIRS_PER_STEP,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            beta=BETA,
            max_length=None,
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
        )
        dataset = self._dataset(texts)
        return DPOTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=self._tokenizer)

    def logps(self, name: str, data: str) -> Answer:
        """As TRL precomputes them, on the token ids that it made of the texts, which have to be those of the data."""
        texts = workloads.read(Path(data))
        some = slice(PAIRS_PER_STEP)
        few = Texts(texts.prompts[some], texts.chosen[some], texts.rejected[some])
        with tempfile.TemporaryDirectory() as scratch:
            dataset = self._trainer(load(), few, True, scratch).train_dataset
            for column, ids in (("prompt_ids", few.prompts), ("chosen_ids", few.chosen)):
                if dataset[column][:] != ids:
                    raise RuntimeError(f"{column} differ: {dataset[column][0]} and {ids[0]}")
            chosen, rejected = dataset["ref_chosen_logps"][:], dataset["ref_rejected_logps"][:]
        return {"chosen": chosen, "rejected": rejected}

    def train(self, name: str, data: str, precompute: bool, pairs: int | None = None) -> Answer:
        return self._train(load(), workloads.read(Path(data)), precompute, pairs)

    def _train(self, model: PreTrainedModel, texts: Texts, precompute: bool, count: int | None = None) -> Answer:
        some = Texts(texts.prompts[:count], texts.chosen[:count], texts.rejected[:count])
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            trainer = self._trainer(model, some, precompute, scratch)
            set_up = time.perf_counter() - start
            trainer.train()
            seconds = time.perf_counter() - start
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"seconds": seconds, "set_up": set_up, "first_loss": logged[0] if logged else None}

    def iteration(self, name: str, data: str, batch: int) -> Answer:
        """From the files on disk to the trained weights on disk: load, generate, set up, train, save."""
        torch.manual_seed(next(self._calls))
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            model = load()
            texts = workloads.read(Path(data))
            loaded = time.perf_counter()
            responses, _ = self._generate(model, WORKLOADS[name], texts.prompts, batch)
            generated = time.perf_counter()
            trained = self._train(model, Texts(texts.prompts, texts.chosen, responses), True)
            ended = time.perf_counter()
            model.save_pretrained(scratch)
            seconds = time.perf_counter() - start
        parts = {"load": loaded - start, "rollout": generated - loaded + trained["set_up"]}
        parts |= {"train_step": trained["seconds"] - trained["set_up"], "checkpoint": start + seconds - ended}
        return {"seconds": seconds, "parts": parts}

    def memory(self, name: str, data: str, precompute: bool) -> Answer:
        self.train(name, data, precompute, pairs=2 * PAIRS_PER_STEP)  # what is made and imported once
        texts = workloads.read(Path(data))
        model = load()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return {"peak": above_idle(lambda: self._train(model, texts, precompute)), "weights": weights}


def main() -> None:
    torch.set_num_threads(_THREADS)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    side = Side()
    commands: tuple[Callable[..., Answer], ...] = (side.generate, side.logps, side.train, side.iteration, side.memory)
    serve({command.__name__: command for command in commands})


if __name__ == "__main__":
    main()
