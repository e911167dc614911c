"""Tokens for training: every row exactly once, whatever the ranks, workers and parts; the same order when resumed."""

import pickle
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from meditok.errors import UsageError
from meditok.tokens import Description, TokenDataset, TokenInfo, Tokens, TokenStream
from meditok.tokens.store import StoreWriter

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
ROWS = 1300  # three row groups, the last one short


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A store whose row i holds i in base 64 as its first ids; (path, tokens)."""
    info = TokenInfo("tiny", "a" * 64, "b" * 64, 2, 64, (1, 3))
    ids = np.random.default_rng(0).integers(0, 64, (ROWS, 2, 3))
    ids[:, 0, 0], ids[:, 0, 1] = np.arange(ROWS) // 64, np.arange(ROWS) % 64
    tokens = Tokens(ids, [Description(f"{i:032x}", 16, 48) for i in range(ROWS)], info)
    path = tmp_path_factory.mktemp("store") / "tokens.parquet"
    tokens.save(path)
    return path, tokens


def numbers(batches) -> list[int]:
    """Row numbers of the rows in some batches of (B, G, N)."""
    return [int(row[0, 0]) * 64 + int(row[0, 1]) for batch in batches for row in batch]


def test_a_dataset_gives_any_row_as_the_file_holds_it(numbered):
    path, tokens = numbered
    data = TokenDataset(path)
    assert len(data) == ROWS and data[7].dtype == torch.int64 and data.vocab_size == 64
    assert torch.equal(torch.stack([data[i] for i in (0, 600, -1)]), tokens.ids[[0, 600, -1]])
    loaded = list(DataLoader(data, batch_size=100, sampler=range(ROWS - 1, -1, -1), num_workers=2))
    assert torch.equal(torch.cat(loaded), tokens.ids.flip(0))


@pytest.mark.parametrize("order", ["position", "codebook"])
def test_sequences_are_those_of_to_sequence(numbered, order):
    path, tokens = numbered
    for offsets in (True, False):
        data = TokenDataset(path, order, offsets)
        assert torch.equal(data[5], tokens.to_sequence(order, offsets)[5])
        assert data.vocab_size == (tokens.vocab_size if offsets else 64)
        stream = TokenStream(path, 512, order, offsets)
        assert torch.equal(torch.cat(list(stream)), tokens.to_sequence(order, offsets))


def test_the_temporary_file_of_a_dataset_goes_with_it_and_only_with_it(numbered, tmp_path):
    data = TokenDataset(numbered[0], folder=tmp_path)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[3], data[3])
    del copy
    assert len(list(tmp_path.iterdir())) == 1
    del data
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (3, 0), (1, 3), (2, 2)])
def test_every_row_is_given_exactly_once(numbered, ranks, workers, shuffle):
    seen = []
    for rank in range(ranks):
        stream = TokenStream(numbered[0], 64, shuffle=shuffle, mix=2, rank=rank, world_size=ranks)
        seen += numbers(DataLoader(stream, batch_size=None, num_workers=workers))
    assert sorted(seen) == list(range(ROWS))
    assert (seen == list(range(ROWS))) == (not shuffle and workers < 2)


def test_one_part_with_two_ranks_and_four_workers_ends_within_ten_seconds(numbered, tmp_path):
    """Also where there are fewer rows than workers."""
    numbered[1][:3].save(tmp_path / "few.parquet")
    for path, rows in ((numbered[0], ROWS), (tmp_path / "few.parquet", 3)):
        started, seen = time.monotonic(), []
        for rank in range(2):
            stream = TokenStream(path, 64, shuffle=True, rank=rank, world_size=2)
            seen += numbers(DataLoader(stream, batch_size=None, num_workers=4, timeout=10))
        assert sorted(seen) == list(range(rows)) and time.monotonic() - started < 10


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(numbered):
    def order(epoch=0, **options):
        stream = TokenStream(numbered[0], 50, shuffle=True, **options)
        stream.set_epoch(epoch)
        return numbers(stream)

    first = order(seed=1)
    assert first == order(seed=1) != order(seed=2) and first != order(1, seed=1)
    parted = [n for rank in range(4) for n in order(seed=1, rank=rank, world_size=4)]
    assert parted == first
    displaced = np.abs(np.array(first) - np.arange(ROWS)).mean()
    assert displaced > ROWS / 6  # a third for a perfect shuffle


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("start", [1, 7, 20])
def test_a_resumed_pass_goes_on_where_it_stopped(numbered, workers, start):
    stream = TokenStream(numbered[0], 64, shuffle=True, seed=3)
    stream.set_epoch(5)
    whole = [numbers([batch]) for batch in DataLoader(stream, batch_size=None, num_workers=workers)]
    stream.set_epoch(5, start)
    rest = [numbers([batch]) for batch in DataLoader(stream, batch_size=None, num_workers=workers)]
    assert rest == whole[start:]


def test_workers_that_stay_alive_see_the_next_epoch(numbered):
    stream = TokenStream(numbered[0], 64, shuffle=True)
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    first = numbers(loader)
    stream.set_epoch(1)
    second = numbers(loader)
    assert first != second and sorted(first) == sorted(second) == list(range(ROWS))


@pytest.mark.parametrize(("tail", "each"), [("drop", ROWS // 7), ("pad", -(-ROWS // 7))])
def test_ranks_can_be_given_equally_many_rows(numbered, tail, each):
    parts = [numbers(TokenStream(numbered[0], 64, rank=r, world_size=7, tail=tail)) for r in range(7)]
    assert {len(part) for part in parts} == {each}
    joined = [n for part in parts for n in part]
    assert joined == [n % ROWS for n in range(7 * each)]


def test_more_ranks_than_rows_can_be_padded_and_are_refused_when_dropping(numbered, tmp_path):
    numbered[1][:3].save(tmp_path / "few.parquet")
    seen = [numbers(TokenStream(tmp_path / "few.parquet", rank=r, world_size=5, tail="pad")) for r in range(5)]
    assert seen == [[0], [1], [2], [0], [1]]
    with pytest.raises(UsageError, match="3 rows for 5 ranks"):
        TokenStream(tmp_path / "few.parquet", rank=0, world_size=5, tail="drop")


def test_a_store_of_parts_is_one_sequence_of_rows(numbered, tmp_path):
    tokens = numbered[1]
    with StoreWriter(tmp_path / "s", tokens.info, shard_size=500) as writer:
        writer.write(tokens.codes, tokens.rows)
        writer.close("x")
    assert numbers(TokenStream(tmp_path / "s", 64)) == list(range(ROWS))
    assert torch.equal(TokenDataset(tmp_path / "s")[1200], tokens.ids[1200])


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"mix": 0}, {"tail": "cut"}, {"rank": 0}, {"rank": 2, "world_size": 2}, {"sequence": "raster"}],
)
def test_options_without_sense_are_usage_errors(numbered, options):
    with pytest.raises(UsageError):
        TokenStream(numbered[0], **options)
