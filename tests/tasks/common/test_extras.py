"""Messages about optional libraries that are not installed."""

from __future__ import annotations

import pytest

from nipq_search.errors import UserError
from nipq_search.tasks.common.extras import requires_extra


def test_a_missing_library_is_named_with_its_extra():
    with (
        pytest.raises(UserError, match=r"task x needs no_such_lib: pip install .*\[text\]'"),
        requires_extra("task x", "text"),
    ):
        import no_such_lib.part  # noqa: F401
