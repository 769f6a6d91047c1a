"""How LoRA adapters are written down."""

from __future__ import annotations

from typing import Any

import pytest

from tpcheck.core.errors import UsageError
from tpcheck.families.adapters import lora_fields


@pytest.mark.parametrize(
    "source", ["4,all-linear,q_proj", "4,attention,all-linear", "4,,dora", "q_proj,4", "0", -1, True, 2**31, {"r": "4"}]
)
def test_what_no_adapter_has_is_refused(source: Any) -> None:
    with pytest.raises(UsageError, match="lora="):
        lora_fields(source)


def test_a_rank_alone_is_on_all_linear_layers() -> None:
    assert lora_fields(8) == lora_fields("8") == {"r": 8, "target_modules": "all-linear"}
    assert lora_fields({})["target_modules"] == "all-linear"
