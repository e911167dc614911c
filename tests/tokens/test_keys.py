"""Keyed names: the hash promised, the key made once and kept private."""

import hashlib
import hmac
import stat

import pytest

from meditok.errors import UsageError
from meditok.tokens.keys import Namer, key_path, load_key


@pytest.fixture
def key_file(tmp_path, monkeypatch):
    path = tmp_path / "config" / "key"
    monkeypatch.setenv("MEDITOK_KEY_FILE", str(path))
    return path


def test_the_key_is_made_once_and_readable_by_its_owner_only(key_file):
    first = load_key()
    assert len(first) == 32 and load_key() == first == key_file.read_bytes()
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert [p.name for p in key_file.parent.iterdir()] == ["key"]


def test_without_the_variable_the_key_lives_in_the_config_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MEDITOK_KEY_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert key_path() == tmp_path / "meditok" / "key"


def test_an_id_is_the_hmac_of_path_and_frame(key_file):
    key_file.parent.mkdir()
    key_file.write_bytes(b"secret")
    key_file.chmod(0o600)
    expected = hmac.new(b"secret", b"a/scan.dcm#3", hashlib.sha256).hexdigest()[:32]
    assert Namer().row_id("a/scan.dcm", 3) == expected


def test_keep_names_gives_the_path(key_file):
    namer = Namer(keep_names=True)
    assert namer.row_id("a/scan.dcm", 0) == "a/scan.dcm"
    assert namer.row_id("a/scan.dcm", 2) == "a/scan.dcm#2"


def test_a_key_that_others_can_read_is_warned_about(key_file):
    load_key()
    key_file.chmod(0o644)
    with pytest.warns(UserWarning, match="chmod 600"):
        load_key()


def test_an_empty_key_file_is_refused(key_file):
    key_file.parent.mkdir()
    key_file.touch()
    with pytest.raises(UsageError, match="empty"):
        load_key()


def test_a_key_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDITOK_KEY_FILE", str(tmp_path / "file" / "key"))
    with pytest.raises(UsageError, match="MEDITOK_KEY_FILE"):
        load_key()
