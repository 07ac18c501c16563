"""The Hugging Face hub: asked once whether it answers, instead of many times and aloud."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator

SECONDS = 5
"""How long the hub may take to say anything at all."""


@contextlib.contextmanager
def hub() -> Iterator[None]:
    """Around a call that may download: no chatter, and only the cache where nothing answers.

    The libraries would try each file half a dozen times, with a message for each.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    log, before = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = log.level
    log.setLevel(logging.CRITICAL)
    constants.HF_HUB_OFFLINE = before or not _answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        log.setLevel(level)


def silent() -> str:
    """Why nothing came from the hub, for messages; empty where it answered."""
    from huggingface_hub import constants

    if _answers.cache_info().currsize == 0:  # nobody asked, so whoever set it did not want to
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    return "" if _answers() else f"{constants.ENDPOINT} does not answer"


@functools.cache
def _answers() -> bool:
    """Whether the hub sends any answer; asked once by each process."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # each of the libraries below has errors of its own
        return False
    return True
