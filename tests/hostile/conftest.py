"""One warm process for all commands of this folder, with a key and a model of its own."""

import pytest

from tests.hostile.forked import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_bytes(b"a key for tests")
    key.chmod(0o600)
    with Forks(MEDITOK_KEY_FILE=str(key)) as running:
        yield running
