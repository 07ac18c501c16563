"""The hub is contacted once, and nothing is printed if it is unreachable."""

from __future__ import annotations

import logging
import time

import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants

from nipq_search.errors import UserError, one_line
from nipq_search.tasks.common import hub
from nipq_search.tasks.text.language_models import ModelSource, load_tokenizer
from nipq_search.tasks.vision.image_folder.models import ImageModel


@pytest.fixture
def unreachable(monkeypatch):
    """A hub at an address on which no server listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub._is_reachable.cache_clear()
    yield
    hub._is_reachable.cache_clear()


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_without_a_network_one_line_comes_soon(unreachable, kind, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match="http://127.0.0.1:9 does not respond") as error:
        if kind == "timm":
            ImageModel(model="resnet18", weights="timm").build(2)
        else:
            load_tokenizer(ModelSource(model="no-org/no-model"))
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 10
    assert capfd.readouterr() == ("", "")
    assert constants.HF_HUB_OFFLINE is False


def test_offline_mode_does_not_contact_the_hub(unreachable, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    log = logging.getLogger("huggingface_hub")
    level = log.level
    with hub.hub_access():
        assert constants.HF_HUB_OFFLINE and log.level == logging.CRITICAL
    assert constants.HF_HUB_OFFLINE and log.level == level
    assert hub.unreachable_reason() == "HF_HUB_OFFLINE is set"


def test_long_reasons_are_cut_between_words():
    text = one_line(OSError("cannot\nreach https://example.org/a/long/path/of/a/file at all"), 40)
    assert text == "cannot reach ..."
