"""Ids in paths."""

import pytest

from oncewise.api.routes.common import _thread_id, _turn_id
from oncewise.errors import NotFound


@pytest.mark.parametrize("text", ["a\0b", "..", "a/b", "", "x" * 65, "' OR 1=1--"])
@pytest.mark.parametrize("check", [_thread_id, _turn_id])
def test_a_text_that_cannot_be_an_id_is_unknown_before_any_look_up(check, text):
    """Some databases fail on a NUL instead of finding nothing."""
    with pytest.raises(NotFound):
        check(text)
    assert check("01a20a45-0776-732e-ab10-ed5d8e638962")
