"""Stratified splits: exact sizes, nothing twice, classes in proportion."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold import DataError
from refold.data import stratified_split

classes = st.lists(st.integers(0, 6), min_size=1, max_size=120)


@settings(deadline=None)
@given(classes, st.integers(0, 2**40), st.data())
def test_parts_are_disjoint_exact_and_in_proportion(labels, seed, data):
    targets = torch.tensor(labels)
    present = len(set(labels))
    first = data.draw(st.integers(present, len(labels)))
    second = data.draw(st.integers(0, len(labels) - first))
    sizes = (first, second, len(labels) - first - second) if len(labels) > 1 else (1.0, 0.0, 0.0)
    parts = stratified_split(targets, sizes, seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert [len(part) for part in parts] == [int(size) for size in sizes]
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert set(targets[parts[0]].tolist()) == set(labels)
    for part in parts:
        for name in set(labels):
            share = labels.count(name) * len(part) / len(labels)
            assert abs(int((targets[part] == name).sum()) - share) < 2


def test_large_classes_are_split_to_the_sample():
    targets = torch.tensor([0] * 1803 + [1] * 821)  # ELPV
    parts = stratified_split(targets, (800, 200, None), seed=0)
    assert [targets[part].bincount().tolist() for part in parts] == [[550, 250], [137, 63], [1116, 508]]


def test_shares_sum_up():
    targets = torch.arange(1000) % 4
    sizes = [len(part) for part in stratified_split(targets, (0.7, 0.15, 0.15))]
    assert sizes == [700, 150, 150]
    assert [len(part) for part in stratified_split(targets, (0.1, 0.1))] == [100, 100]
    assert [len(part) for part in stratified_split(targets, (0.1, None, 0.2))] == [100, 700, 200]
    assert [len(part) for part in stratified_split(targets, (1, 0, 0))] == [1000, 0, 0]
    assert [len(part) for part in stratified_split(targets, (600, 400, None))] == [600, 400, 0]


def test_seed_alone_decides():
    targets = torch.arange(300) % 3
    random.seed(0)
    torch.manual_seed(0)
    first = stratified_split(targets, (0.8, 0.2), seed=5)
    random.seed(1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = stratified_split(targets, (0.8, 0.2), seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], stratified_split(targets, (0.8, 0.2), seed=6)[1])


def test_membership_is_random_within_a_class():
    """Each sample of a class is as likely as another to be drawn, whatever its place."""
    targets = torch.tensor([0] * 10 + [1] * 10)
    hits = torch.zeros(20)
    for seed in range(400):
        hits[stratified_split(targets, (0.8, 0.2), seed)[1]] += 1
    assert (hits / 400 - 0.2).abs().max() < 0.08  # 4 standard deviations


def test_a_single_sample_goes_to_the_first_part():
    targets = torch.tensor([0] * 50 + [1] + [2] * 50)
    for seed in range(20):
        assert 50 in stratified_split(targets, (3, 97, 1), seed)[0].tolist()


def test_rarest_label_is_spread():
    random.seed(0)
    targets = torch.zeros(200, 3)
    targets[:, 0] = 1.0  # everything
    targets[:100:2, 1] = 1.0  # 50
    targets[:20, 2] = 1.0  # 20
    targets[190:] = 0.0  # 10 without a label
    parts = stratified_split(targets, (0.5, 0.3, 0.2), seed=1)
    for part, share in zip(parts, (0.5, 0.3, 0.2), strict=True):
        assert abs(float(targets[part, 2].sum()) - 20 * share) <= 1
        assert abs(float(targets[part, 1].sum()) - 50 * share) <= 3
        assert abs(int((targets[part].sum(1) == 0).sum()) - 10 * share) <= 1


def test_numbers_are_spread():
    targets = torch.randn(500, generator=torch.Generator().manual_seed(0)).exp()
    for part in stratified_split(targets, (0.6, 0.4), seed=2):
        quantiles = torch.tensor([0.1, 0.5, 0.9])
        assert torch.allclose(targets[part].quantile(quantiles), targets.quantile(quantiles), rtol=0.1)
    small = stratified_split(torch.tensor([3.0, 1.0]), (1, 1), seed=0)
    assert sorted(torch.cat(small).tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((), "no sizes"),
        ((-1, 5), "no sizes"),
        ((float("nan"), 0.5), "no sizes"),
        ((None, None), "no sizes"),
        ((0.8, 0.3), "more than all"),
        ((5.0, 3.0), "more than all"),
        ((8, 3), "ask for 11 of 10"),
        ((0.99, 0.01), "empty"),
        ((1, 9), "cannot hold one of each of 2 classes"),
    ],
)
def test_sizes_that_do_not_fit(sizes, words):
    with pytest.raises(DataError, match=words):
        stratified_split(torch.arange(10) % 2, sizes)


def test_negative_seed():
    with pytest.raises(DataError, match="seed -1"):
        stratified_split(torch.arange(10) % 2, (0.5, 0.5), seed=-1)
