"""Tokens in memory: sequences for language models, indexing, checks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meditok.errors import TokenRangeError, TokenShapeError, UsageError
from meditok.tokens import Description, TokenInfo, Tokens


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from(["position", "codebook"]),
    st.booleans(),
)
def test_a_sequence_comes_back_as_the_tokens_it_was_made_of(rows, groups, height, width, codes, order, offsets):
    info = TokenInfo("m", "a", "b", groups, codes, (height, width))
    ids = torch.randint(0, codes, (rows, groups, height * width))
    tokens = Tokens(ids, [Description(str(i), 16 * height, 16 * width) for i in range(rows)], info)
    sequence = tokens.to_sequence(order, offsets)
    assert sequence.shape == (rows, groups * height * width) and sequence.dtype == torch.int64
    assert torch.equal(tokens.from_sequence(sequence, order, offsets).ids, ids)


def test_in_position_order_a_positions_codebooks_stand_together_and_codebook_i_starts_at_i_k(make_tokens):
    tokens = make_tokens(2)
    sequence = tokens.to_sequence()
    assert tokens.vocab_size == 8 * 4096
    for position, group in ((0, 0), (0, 7), (5, 3)):
        assert sequence[1, position * 8 + group] == tokens.ids[1, group, position] + group * 4096
    assert torch.equal(tokens.to_sequence("codebook", offsets=False)[0, :16], tokens.ids[0, 0])


def test_a_generated_sequence_becomes_plain_rows(make_tokens):
    tokens = make_tokens(2)
    made = tokens.from_sequence(tokens.to_sequence()[[0, 1, 1]])
    assert len(made) == 3 and made.rows[2].id == "generated-2" and made.rows[2].height == 64


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda s: s[:, :-1], TokenShapeError),
        (lambda s: s[0], TokenShapeError),
        (lambda s: s.float(), TokenRangeError),
        (lambda s: s - 4096, TokenRangeError),
        (lambda s: s + 4096, TokenRangeError),
    ],
)
def test_a_sequence_that_cannot_be_tokens_is_refused(make_tokens, change, error):
    tokens = make_tokens(2)
    with pytest.raises(error):
        tokens.from_sequence(change(tokens.to_sequence()))


def test_an_unknown_order_lists_the_known_ones(make_tokens):
    with pytest.raises(UsageError, match="position, codebook"):
        make_tokens().to_sequence("raster")


def test_indexing_keeps_ids_and_rows_together(make_tokens):
    tokens = make_tokens(5)
    picked = tokens[1:4:2]
    assert [row.id for row in picked.rows] == [tokens.rows[1].id, tokens.rows[3].id]
    assert torch.equal(picked.ids, tokens.ids[[1, 3]])
    assert len(tokens[2]) == 1


def test_ids_of_another_shape_than_the_header_says_are_refused(make_tokens):
    tokens = make_tokens(2)
    with pytest.raises(TokenShapeError, match=r"\(2, 7, 16\)"):
        Tokens(tokens.ids[:, :7], tokens.rows, tokens.info)
