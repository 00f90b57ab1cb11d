"""No network is found out at once, and nothing is asked where the cache has an answer."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from sdtune import hub_access
from sdtune.data.sources import load_source
from sdtune.errors import HubError
from sdtune.families.loading import read_index


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, without proxies, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_access, "getproxies", dict)
    hub_access.unreachable.cache_clear()


def test_no_network_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening: refuses
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        # The libraries would wait for 1 + 2 + 4 + 8 + 8 seconds and ask again after each.
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("retried"))
        with pytest.raises(HubError, match="is no folder here.*no connection to 127.0.0.1: Connection refused"):
            read_index("me/mine")
        with pytest.raises(HubError, match="'me/mine' is not in the cache and the Hub cannot be reached"):
            load_source(hub="me/mine")


def test_a_server_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_access.hub_fault("me/mine") == ""


def test_the_cache_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_access.hub_fault("me/mine", "dataset") == "HF_HUB_OFFLINE is set"
    (tmp_path / "cache" / "datasets--me--mine").mkdir(parents=True)
    assert hub_access.hub_fault("me/mine", "dataset") == ""
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set.*hf download me/mine`.*tiny"):
        read_index("me/mine")


def test_behind_a_proxy_the_libraries_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_access, "getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr(constants, "ENDPOINT", "https://nowhere.invalid")
    assert hub_access.hub_fault("me/mine") == ""
