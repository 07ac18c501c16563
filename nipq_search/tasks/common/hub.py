"""Access to the Hugging Face Hub, with one reachability test per process and no client output."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

TIMEOUT_SECONDS = 5
"""Timeout for the reachability test."""


@contextlib.contextmanager
def hub_access() -> Iterator[None]:
    """Run a block that may download files; if the hub is unreachable, use only the cache.

    Without this, the client would retry each file several times and log a message for every
    attempt.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    log, before = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = log.level
    log.setLevel(logging.CRITICAL)
    constants.HF_HUB_OFFLINE = before or not _is_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        log.setLevel(level)


def unreachable_reason() -> str:
    """Return why the hub was not used, for messages; the string is empty if it is reachable."""
    from huggingface_hub import constants

    if _is_reachable.cache_info().currsize == 0:  # offline mode was set by the user
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    return "" if _is_reachable() else f"{constants.ENDPOINT} does not respond"


@functools.cache
def _is_reachable() -> bool:
    """Whether the hub responds at all; tested once per process."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception:  # the type depends on the HTTP library
        return False
    return True
