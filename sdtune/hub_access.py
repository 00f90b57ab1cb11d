"""What is a hub id, and is the Hub there?

Asked once before a download, for the libraries try for half a minute and fill the screen.
"""

import re
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 5.0  # seconds


def looks_like_hub_id(name: str) -> bool:
    """Whether a name that is no path on this machine has the form user/name."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", name, re.ASCII))


def hub_fault(repo: str, kind: str = "model") -> str:
    """Why a repository cannot be had; empty when it is in the cache, at least in part, or the Hub answers.

    Args:
        repo: user/name. kind: "model" or "dataset".
    """
    from huggingface_hub import constants

    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}").is_dir():
        return ""
    return "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else unreachable(constants.ENDPOINT)


@lru_cache
def unreachable(endpoint: str) -> str:
    """Why a web address does not answer; empty when it does, or when a proxy stands between."""
    address = urlsplit(endpoint)
    if getproxies():
        return ""
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=PATIENCE).close()
    except OSError as fault:
        return f"no connection to {address.hostname}: {fault.strerror or fault}"
    return ""
