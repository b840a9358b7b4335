from __future__ import annotations

import itertools

import pytest
import torch

from nemo_spin.config import DatasetConfig
from nemo_spin.data.dataset import load_dataset
from nemo_spin.data.order import Share, batches, epoch_order, epoch_size, num_batches
from nemo_spin.errors import ConfigError


def test_order_is_a_permutation_of_seed_iteration_and_epoch_only():
    orders = {}
    for seed, iteration, epoch in itertools.product((0, 1, 11), (0, 1, 11), (0, 1, 11)):
        order = epoch_order(101, seed, iteration, epoch, shuffle=True)
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(101))
        orders[tuple(order.tolist())] = seed, iteration, epoch
    assert len(orders) == 27

    state = torch.random.get_rng_state()
    again = epoch_order(101, 1, 11, 0, shuffle=True)
    assert orders[tuple(again.tolist())] == (1, 11, 0)  # whatever was drawn before
    assert torch.equal(state, torch.random.get_rng_state())


def test_order_stays_as_it_is_across_versions():
    assert epoch_order(8, seed=1234, iteration=0, epoch=0, shuffle=True).tolist() == [4, 2, 7, 1, 0, 3, 6, 5]


def test_no_shuffle():
    assert epoch_order(5, 1, 2, 3, shuffle=False).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, 101), (-1, 101), (1.0, 101), (1, 1), (7, 7), (500, 101), (0, 0), (0.0, 0), (0.5, 50), (0.001, 1),
        (0.999, 100),
    ],
)  # fmt: skip
def test_num_batches(limit, expected):
    assert num_batches(1001, 10, limit) == expected


def test_num_batches_survives_floating_point():
    assert num_batches(1000, 10, 0.29) == 29
    assert num_batches(0, 10, 0.5) == 0


@pytest.mark.parametrize("limit", [-2, -0.5, 1.5, float("nan")])
def test_limits_that_mean_nothing(limit):
    with pytest.raises(ConfigError, match="limit"):
        num_batches(10, 2, limit)


@pytest.mark.parametrize("limit", [None, 3, 0.8])
def test_batches_resume_with_the_tail(write, tokenizer, limit):
    lines = [f'{{"prompt_ids": [{i}], "response_ids": [2]}}' for i in range(18)]
    dataset = load_dataset(DatasetConfig((write(*lines),)), tokenizer, 9)
    order = epoch_order(18, 1, 0, 0, shuffle=True)
    whole = list(batches(dataset, order, 4, limit_batches=limit))
    assert len(whole) == num_batches(18, 4, limit)
    for start in range(7):
        assert list(batches(dataset, order, 4, start_batch=start, limit_batches=limit)) == whole[start:]
    if limit is None:
        assert [len(batch) for batch in whole] == [4, 4, 4, 4, 2]
        assert [example.index for batch in whole for example in batch] == order.tolist()


# weights


def counts(order, first: int, size: int) -> list[int]:
    return torch.bincount(order, minlength=first + size)[first : first + size].tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_are_passes_over_a_file(shuffle):
    shares = [Share(4, 1.0), Share(10, 0.5), Share(3, 2.0), Share(4, 1.25)]
    assert epoch_size(shares) == 4 + 5 + 6 + 5
    seen = torch.zeros(10, dtype=torch.int64)
    for iteration, epoch in itertools.product(range(2), range(2)):
        order = epoch_order(shares, 7, iteration, epoch, shuffle, 2 * iteration + epoch)
        assert order.dtype == torch.int64 and len(order) == epoch_size(shares)
        assert counts(order, 0, 4) == [1] * 4
        assert counts(order, 14, 3) == [2] * 3
        assert sorted(counts(order, 17, 4)) == [1, 1, 1, 2]
        half = counts(order, 4, 10)
        assert sorted(half) == [0] * 5 + [1] * 5
        seen += torch.tensor(half)
        # the other half is for the next epoch, though it is the next iteration's
        assert seen.tolist() == half if (iteration, epoch) == (0, 0) else True
        assert len(set(seen.tolist())) == (2 if epoch == 0 else 1)
    assert seen.tolist() == [2] * 10


def test_weighted_orders_are_a_function_of_seed_iteration_and_epoch():
    shares = [Share(50, 0.3), Share(20, 1.0)]
    orders = {
        tuple(epoch_order(shares, *place, shuffle=True, epochs_before=2 * place[1] + place[2]).tolist())
        for place in itertools.product((1, 2), (0, 1), (0, 1))
    }
    assert len(orders) == 8
    assert tuple(epoch_order(shares, 2, 1, 1, shuffle=True, epochs_before=3).tolist()) in orders


def test_a_file_with_weight_one_is_as_without_weights():
    assert torch.equal(epoch_order([Share(30, 1.0), Share(11, 1)], 3, 1, 2, True), epoch_order(41, 3, 1, 2, True))


def test_a_tiny_share_is_at_least_one_example():
    assert epoch_order([Share(3, 0.01)], 1, 0, 0, shuffle=False).tolist() == [0]
