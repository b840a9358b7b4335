"""Adam and RMSProp: against torch's own on another model, in every layout, and over checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from selfplay import BETA, SelfPlay, as_pairs, examples, relative_distance, whole_weights
from toy import to_transformers

from nemo_spin.config import SchedConfig
from nemo_spin.model_io.stores.sharded import save_sharded
from nemo_spin.selfplay.pairs import Pair

CONSTANT = SchedConfig(name="Constant", warmup_steps=0, constant_steps=0, min_lr=0.0)
# A large eps keeps rounding errors of near-zero gradients from being blown up to whole updates.
RMSPROP = {"name": "rmsprop", "weight_decay": 0.0, "alpha": 0.9, "eps": 1e-2}
ADAM = {"name": "adam"}
LR = 1e-3


def begin(**options: Any) -> tuple[SelfPlay, list[Pair]]:
    play = SelfPlay(sched=CONSTANT, **options)
    data = examples()
    return play, as_pairs(data, play.roll_out(data, 0))


# ---------------------------------------------------------------------------------------- RMSProp


def steps_of_rmsprop(count: int, **options: Any) -> list:
    play, pairs = begin(**RMSPROP, **options)
    play.optimizer.start(LR, count)
    for _ in range(count):
        play.step(pairs)
    return play.shards()


def beside_torch(count: int) -> dict[str, float]:
    """Distances of weights after so many steps by us, and by torch's RMSprop on transformers' model in fp64."""
    play, pairs = begin(**RMSPROP)
    theirs = to_transformers(play.architecture, play.gpt).double()
    initial = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    rmsprop = torch.optim.RMSprop(theirs.parameters(), lr=LR, alpha=RMSPROP["alpha"], eps=RMSPROP["eps"])

    def logps(prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        log_softmax = theirs(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        return sum(log_softmax[len(prompt) + i - 1, token] for i, token in enumerate(response))

    play.optimizer.start(LR, count)
    for _ in range(count):
        play.step(pairs)
        margins = []
        for pair in pairs:
            chosen = logps(pair.example.prompt_ids, pair.example.response_ids) - pair.ref_chosen_logps
            margins.append(
                BETA * (chosen - logps(pair.example.prompt_ids, pair.rejected_ids) + pair.ref_rejected_logps)
            )
        rmsprop.zero_grad()
        (-torch.stack(margins).sigmoid().log().mean()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        rmsprop.step()
    ours = dict(to_transformers(play.architecture, play.gpt).named_parameters())
    return {name: float((ours[name] - p).norm() / (p - initial[name]).norm()) for name, p in theirs.named_parameters()}


def test_rmsprop_is_torchs_on_an_independent_model(workers: Any) -> None:
    (distances,) = workers.run(beside_torch, 4)
    assert max(distances.values()) < 1e-4, distances


def test_rmsprop_moves_every_layout_alike(workers: Any) -> None:
    expected = whole_weights(workers.run(steps_of_rmsprop, 4))
    for layout in ({"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2}):
        assert relative_distance(whole_weights(workers.run(steps_of_rmsprop, 4, **layout)), expected) < 1e-5
    assert relative_distance(whole_weights(workers.run(steps_of_rmsprop, 3)), expected) > 1e-4


def small_steps_in_bf16(count: int) -> float:
    """Share of the weights that have changed."""
    play, pairs = begin(**RMSPROP | {"eps": 1e-8}, precision="bf16")
    before = [p.detach().clone() for p in play.gpt.parameters()]
    play.optimizer.start(1e-5, count)
    for _ in range(count):
        play.step(pairs)
    changed = sum(int((a != b).sum()) for a, b in zip(before, play.gpt.parameters(), strict=True))
    return changed / sum(p.numel() for p in before)


def test_rmsprop_adds_up_in_fp32_what_bf16_cannot_hold(workers: Any) -> None:
    one, many = (workers.run(small_steps_in_bf16, count)[0] for count in (1, 40))
    assert many > 0.1
    assert many > 3 * one


def a_step_after(steps_before: int, fresh: bool, precision: str) -> list:
    """The update that a step makes from the toy's initial weights, with RMSProp that has done others before."""
    play, pairs = begin(**RMSPROP, precision=precision)
    initial = [p.detach().clone() for p in play.gpt.parameters()]
    play.optimizer.start(LR, 100)
    for _ in range(steps_before):
        play.step(pairs)
    with torch.no_grad():
        for parameter, value in zip(play.gpt.parameters(), initial, strict=True):
            parameter.copy_(value)
    play.optimizer._optimizer.reload_model_params()  # in bf16, the fp32 copies
    play.optimizer.start(LR, 100, fresh=fresh)
    play.step(pairs)
    return play.shards()


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_fresh_rmsprop_has_forgotten_what_it_did(workers: Any, precision: str) -> None:
    new, reset, carried_on = (
        whole_weights(workers.run(a_step_after, *arguments, precision))
        for arguments in ((0, True), (3, True), (3, False))
    )
    assert relative_distance(reset, new) == 0.0
    assert relative_distance(carried_on, new) > 1e-5


# ---------------------------------------------------------------------------------------- checkpoints


def state_of(play: SelfPlay, is_loading: bool) -> dict[str, Any]:
    policy = {name: s for name, s in play.gpt.sharded_state_dict().items() if not name.endswith("_extra_state")}
    return {"policy": policy, "optimizer": play.optimizer.sharded_state_dict(policy, is_loading)}


def over_a_checkpoint(directory: str, options: dict[str, Any], before: int, fresh: bool) -> list[list]:
    """Weights after four steps: in one go, with a checkpoint written on the way, and by one that begins with it."""
    found = []
    for kind in ("uninterrupted", "saved", "resumed"):
        play, pairs = begin(**options)
        done = 0
        if kind == "resumed":
            state = dist_checkpointing.load(state_of(play, is_loading=True), directory)
            play.gpt.load_state_dict(state["policy"], strict=False)
            play.optimizer.load_state_dict(state["optimizer"])
            done = before
        play.optimizer.start(LR, 4, done, fresh=fresh and not done)
        for step in range(done, 4):
            if kind == "saved" and step == before:
                save_sharded(state_of(play, is_loading=False), Path(directory))
                dist.barrier()
            play.step(pairs)
        found.append(play.shards())
    return found


CASES = {
    "adam-first-step": ({"tp": 2}, ADAM, 0, True),
    "adam-carried-on": ({"pp": 2}, ADAM, 0, False),
    "adam-bf16-first-step": ({"dp": 2}, {**ADAM, "precision": "bf16"}, 0, True),
    "distributed-adam-first-step": ({"dp": 2}, {"name": "distributed_fused_adam"}, 0, True),
    "rmsprop-first-step": ({"dp": 2}, RMSPROP, 0, True),
    "rmsprop-bf16-first-step": ({"tp": 2}, {**RMSPROP, "precision": "bf16"}, 0, False),
    "adam-midst": ({}, ADAM, 2, True),
    "rmsprop-midst": ({"tp": 2, "pp": 2}, RMSPROP, 2, True),
    "rmsprop-bf16-midst": ({"dp": 2}, {**RMSPROP, "precision": "bf16"}, 2, True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_changes_nothing(workers: Any, tmp_path: Path, name: str) -> None:
    layout, *arguments = CASES[name]
    ranks = workers.run(over_a_checkpoint, str(tmp_path), *arguments, **layout)
    expected, saved, resumed = (whole_weights([rank[i] for rank in ranks]) for i in range(3))
    assert relative_distance(saved, expected) == 0.0
    assert relative_distance(resumed, expected) == 0.0


# ---------------------------------------------------------------------------------------- what only kernels of GPUs do


def a_clipped_step(norm_has_an_axis: bool) -> list:
    """TransformerEngine's kernels compute the norm as a tensor of shape [1]."""
    play, pairs = begin(**ADAM)
    wrapper = play.optimizer._optimizer
    wrapper.config.clip_grad = 0.01
    if norm_has_an_axis:
        norm = wrapper.get_grad_norm
        wrapper.get_grad_norm = lambda: torch.tensor([float(norm())])
    play.optimizer.start(LR, 1)
    assert play.step(pairs)["grad_norm"] > 0.01
    return play.shards()


def test_a_norm_of_shape_1_clips_as_a_number_does(workers: Any) -> None:
    number, tensor = (whole_weights(workers.run(a_clipped_step, axis)) for axis in (False, True))
    assert number.keys() == tensor.keys()
    assert all(torch.equal(number[name], tensor[name]) for name in number)


def a_step_with_learned_positions() -> tuple[set[torch.dtype], float]:
    play, pairs = begin(architecture={"position_embedding_type": "learned_absolute"}, precision="bf16", **ADAM)
    play.optimizer.start(LR, 1)
    return {parameter.dtype for parameter in play.gpt.parameters()}, play.step(pairs)["loss"]


def test_learned_positions_have_the_precision_of_the_model(workers: Any) -> None:
    ((dtypes, loss),) = workers.run(a_step_with_learned_positions)
    assert dtypes == {torch.bfloat16}
    assert loss == pytest.approx(0.6931, abs=1e-3)
