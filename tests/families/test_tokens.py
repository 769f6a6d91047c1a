"""The text form of synthetic batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck import UsageError
from tpcheck.families.tokens import Tokens


@given(st.builds(Tokens, st.integers(1, 99), st.integers(1, 99), st.booleans(), st.booleans()))
def test_parsing_the_text_form_returns_the_same_form(tokens: Tokens) -> None:
    assert Tokens.parse(str(tokens)) == tokens


@pytest.mark.parametrize("text", ["", "3", "x7", "0x7", "3x-1", "3x7,wide", "3x7,padded,padded", "3 x y"])
def test_any_other_text_is_bad_usage(text: str) -> None:
    with pytest.raises(UsageError, match="ROWSxLENGTH"):
        Tokens.parse(text)
