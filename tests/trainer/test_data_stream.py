"""The order of the data, the weights of its sources, packing and batches."""

import numpy as np
import pytest

# ruff: noqa: E402  (without the trainer extra, this file is skipped)
torch = pytest.importorskip("torch", reason="needs the trainer extra")

from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data.render import Tokens
from finetune_trainer.data.stream import IGNORED, Draft, Rows, Stream, collate, pack, permutation


def rows(name: str, lengths: list[int], first: int = 0) -> Rows:
    """Row r is the token first + r, repeated; all but the first token are learned."""
    made = []
    for number, length in enumerate(lengths):
        made.append(Draft((Tokens(np.full(length, first + number, np.int32), np.arange(length) > 0),)))
    return Rows.of(name, made)


def lengths(count: int, seed: int = 0, low: int = 2, high: int = 60) -> list[int]:
    return np.random.default_rng(seed).integers(low, high, count).tolist()


def seen(stream: Stream, epoch: int) -> list[tuple[tuple[int, int], ...]]:
    return [stream.item(epoch, index).rows for index in range(stream.items(epoch))]


@pytest.mark.parametrize("packing", [False, True])
def test_the_order_is_a_pure_function_of_seed_epoch_and_index(packing):
    def make(seed: int = 1) -> Stream:
        return Stream([rows("a", lengths(50)), rows("b", lengths(30, 1))], [1.0, 0.5], seed, packing, 64)

    straight = make()
    order = [seen(straight, epoch) for epoch in range(4)]
    late = make()  # a resumed run asks for the last epoch first, and for one place only
    assert late.item(3, 7).rows == order[3][7]
    assert [seen(late, epoch) for epoch in (2, 0, 3, 1)] == [order[epoch] for epoch in (2, 0, 3, 1)]
    assert seen(make(seed=2), 0) != order[0]
    assert order[0] != order[1]


def test_the_order_never_changes_between_versions():
    """These figures stand in the checkpoints of users: a run resumed with a newer image must see the same rows."""
    stream = Stream([rows("a", [5] * 6), rows("b", [3] * 3)], [1.0, 2.0], 42, False, 64)
    assert [place[0] for place in seen(stream, 1)] == [
        (1, 2),
        (0, 3),
        (1, 0),
        (0, 5),
        (1, 1),
        (0, 2),
        (1, 1),
        (1, 2),
        (1, 0),
        (0, 1),
        (0, 4),
        (0, 0),
    ]
    packed = Stream([rows("a", [30, 7, 50, 12, 44, 9, 21, 38, 16])], [1.0], 42, True, 64)
    assert [[row for _, row in places] for places in seen(packed, 0)] == [[2, 3], [4, 8], [0, 5, 1], [7, 6]]


def test_a_permutation_is_one_and_is_fair():
    for size in (0, 1, 2, 1000):
        assert sorted(permutation(size, 3)) == list(range(size))
    places = np.array([np.argsort(permutation(10, 7, epoch))[0] for epoch in range(4000)])
    assert abs(places.mean() - 4.5) < 0.2
    assert np.bincount(places, minlength=10).min() > 300


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("weight", "each"), [(1.0, 1), (2.0, 2), (3.0, 3)])
def test_a_whole_weight_shows_every_row_so_often(packing, weight, each):
    stream = Stream([rows("a", lengths(37)), rows("b", lengths(5))], [weight, 1.0], 0, packing, 64)
    for epoch in range(2):
        count = dict.fromkeys([(0, r) for r in range(37)] + [(1, r) for r in range(5)], 0)
        for places in seen(stream, epoch):
            for place in places:
                count[place] += 1
        assert {count[0, r] for r in range(37)} == {each}
        assert {count[1, r] for r in range(5)} == {1}


def test_half_a_weight_shows_the_other_half_in_the_next_epoch():
    stream = Stream([rows("a", [4] * 40)], [0.5], 0, False, 64)
    halves = [{place[0][1] for place in seen(stream, epoch)} for epoch in range(4)]
    assert [len(half) for half in halves] == [20] * 4
    assert halves[0] | halves[1] == set(range(40))
    assert halves[2] | halves[3] == set(range(40))
    assert halves[0] != halves[2], "a fresh half"


def test_a_source_too_small_for_its_weight_still_comes():
    stream = Stream([rows("a", [4] * 10), rows("b", [4] * 3)], [1.0, 0.01], 0, False, 64)
    assert stream.items(0) == 11


@pytest.mark.parametrize("packing", [False, True])
def test_a_position_finds_its_epoch_and_index(packing):
    stream = Stream([rows("a", lengths(45))], [1.0], 0, packing, 64)
    places = [(epoch, index) for epoch in range(3) for index in range(stream.items(epoch))]
    fresh = Stream([rows("a", lengths(45))], [1.0], 0, packing, 64)
    assert [fresh.locate(position) for position in range(len(places))] == places
    with pytest.raises(IndexError, match="epoch 0 has"):
        stream.item(0, stream.items(0))


@given(st.lists(st.integers(1, 100), max_size=300))
@settings(max_examples=100, deadline=None)
def test_packs_hold_every_row_once_and_never_too_much(sizes):
    packs = pack(np.array(sizes, dtype=np.int64), 100)
    assert sorted(number for members in packs for number in members) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in members) <= 100 for members in packs)
    # no two packs could have been one: best fit leaves at most one pack half empty
    assert sum(sum(sizes[number] for number in members) <= 50 for members in packs) <= 1


def test_packing_fills():
    sizes = np.random.default_rng(0).lognormal(5.5, 0.8, 20000).astype(np.int64).clip(8, 2048)
    packs = pack(sizes, 2048)
    assert sizes.sum() / (len(packs) * 2048) > 0.99


def test_packs_are_shuffled_and_so_is_what_is_packed_together():
    stream = Stream([rows("a", lengths(500))], [1.0], 0, True, 64)
    first, second = seen(stream, 0), seen(stream, 1)
    again = {frozenset(places) for places in first if len(places) > 1} & {frozenset(places) for places in second}
    assert len(again) < len(first) / 20
    fill = [len(stream.item(0, index)) for index in range(stream.items(0))]
    assert abs(np.mean(fill[: len(fill) // 2]) - np.mean(fill[len(fill) // 2 :])) < 4


def test_a_pack_restarts_positions_and_never_learns_a_first_token():
    made = [
        Draft((Tokens(np.array(ids, np.int32), np.ones(len(ids), bool)),)) for ids in ([1, 2, 3], [4, 5], [6, 7, 8])
    ]
    stream = Stream([Rows.of("a", made)], [1.0], 0, True, 8, shuffle=False)
    [item] = [stream.item(0, index) for index in range(stream.items(0))]
    [sequence] = item.sequences
    assert sequence.input_ids.tolist() == [1, 2, 3, 6, 7, 8, 4, 5]
    assert sequence.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert sequence.labels.tolist() == [IGNORED, 2, 3, IGNORED, 7, 8, IGNORED, 5]


def test_a_batch_of_rows_is_padded_on_the_right():
    stream = Stream([rows("a", [3, 5], first=10)], [1.0], 0, False, 64, shuffle=False)
    batch = collate([stream.item(0, 0), stream.item(0, 1)], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[10, 10, 10, 0, 0, 0, 0, 0], [11, 11, 11, 11, 11, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [IGNORED, 10, 10] + [IGNORED] * 5
    assert batch["num_tokens"] == 8
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids", "attention_mask"))


def test_padding_of_a_pack_is_a_row_of_its_own():
    stream = Stream([rows("a", [3, 2])], [1.0], 0, True, 64, shuffle=False)
    batch = collate([stream.item(0, 0)], pad_token_id=9)
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["num_tokens"] == 5
    assert collate([stream.item(0, 0)], 9, multiple_of=64)["input_ids"].shape == (1, 64)


def test_an_item_of_several_sequences_and_its_numbers():
    """As a preference has them; batches hold all first sequences, then all second ones."""
    made = [
        Draft(
            tuple(Tokens(np.full(length, 10 * row + part, np.int32), np.arange(length) > 0) for part in (0, 1)),
            {"margin": float(row), "task": row % 2, "scores": [row, row + 1]},
        )
        for row, length in enumerate((3, 5, 4))
    ]
    halves = [Rows.of("a", made[:2]), Rows.of("a", made[2:])]
    joined = Rows.joined("a", [Rows.of("a", []), *halves])
    assert (len(joined), joined.parts, joined.lengths.tolist()) == (3, 2, [6, 10, 8])
    stream = Stream([joined], [1.0], 0, False, 64, shuffle=False)
    batch = collate([stream.item(0, 1), stream.item(0, 2)], pad_token_id=0)
    assert batch["input_ids"][:, 3].tolist() == [10, 20, 11, 21]
    assert batch["attention_mask"].sum(-1).tolist() == [5, 4, 5, 4]
    assert batch["margin"].dtype == torch.float32 and batch["margin"].tolist() == [1.0, 2.0]
    assert batch["scores"].tolist() == [[1, 2], [2, 3]]
    assert "task" not in batch and batch["tasks"][:, 0].tolist() == [1, 0, 1, 0]


def test_labels_may_be_other_than_the_tokens():
    tags = Tokens(np.array([4, 5, 6], np.int32), np.array([True, False, True]), np.array([1, 0, 2], np.int32))
    stream = Stream([Rows.of("a", [Draft((tags,))])], [1.0], 0, False, 64)
    assert stream.item(0, 0).sequences[0].labels.tolist() == [1, IGNORED, 2]


def test_300_thousand_rows_are_packed_in_seconds():
    import time

    starts = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(20, 900, 300_000))])
    big = Rows("a", np.zeros(int(starts[-1]), np.int32), np.ones(int(starts[-1]), bool), starts)
    stream = Stream([big], [1.0], 0, True, 2048)
    begin = time.process_time()
    assert stream.items(0) > 60_000
    assert time.process_time() - begin < 10
