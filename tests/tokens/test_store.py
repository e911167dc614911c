"""Folders of parts: what may be read, what may be written where."""

import json

import pytest

from meditok.errors import BadInputError
from meditok.tokens import Tokens
from meditok.tokens.store import StoreWriter, open_tokens


def write(out, tokens, settings="s", **options):
    with StoreWriter(out, tokens.info, **options) as writer:
        writer.write(tokens.codes, tokens.rows)
        writer.close(settings)


def test_rows_are_divided_into_parts_by_their_order_alone(make_tokens, tmp_path):
    tokens = make_tokens(11)
    write(tmp_path / "a", tokens, shard_size=4)
    with StoreWriter(tmp_path / "b", tokens.info, shard_size=4) as writer:
        for i in range(11):
            writer.write(tokens.codes[i : i + 1], tokens.rows[i : i + 1])
        writer.close("s")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "store.json"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    back = Tokens.load(tmp_path / "a")
    assert back.rows == tokens.rows and (back.codes == tokens.codes).all()


def test_an_unfinished_store_is_refused_until_it_is_finished(make_tokens, tmp_path):
    tokens = make_tokens(9)
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s", tokens.info, shard_size=4) as writer:
        writer.write(tokens.codes, tokens.rows)
        raise KeyboardInterrupt
    assert not list((tmp_path / "s").glob(".*"))
    with pytest.raises(BadInputError, match="unfinished"):
        open_tokens(tmp_path / "s")
    write(tmp_path / "s", tokens, shard_size=100)
    assert len(Tokens.load(tmp_path / "s")) == 9
    assert len(list((tmp_path / "s").glob("part-*"))) == 1


def test_a_store_that_got_no_part_leaves_nothing(make_tokens, tmp_path):
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "s", make_tokens(1).info):
        raise KeyboardInterrupt
    assert not (tmp_path / "s").exists()


def test_a_lost_part_is_noticed(make_tokens, tmp_path):
    write(tmp_path / "s", make_tokens(9), shard_size=4)
    (tmp_path / "s" / "part-00001.parquet").unlink()
    with pytest.raises(BadInputError, match="part-00001"):
        open_tokens(tmp_path / "s")


def test_a_part_of_another_model_is_refused(make_tokens, tmp_path):
    import dataclasses

    tokens = make_tokens(8)
    write(tmp_path / "s", tokens, shard_size=4)
    write(tmp_path / "t", make_tokens(8, dataclasses.replace(tokens.info, model_hash="e" * 64)), shard_size=4)
    (tmp_path / "t" / "part-00001.parquet").replace(tmp_path / "s" / "part-00001.parquet")
    with pytest.raises(BadInputError, match="not of one store"):
        open_tokens(tmp_path / "s")


def test_store_json_names_no_path(make_tokens, tmp_path):
    write(tmp_path / "secret-place", make_tokens(3))
    text = (tmp_path / "secret-place" / "store.json").read_text()
    assert "secret-place" not in text and json.loads(text)["rows"] == 3
