"""LoRA adapters on the small model of a family: how they are written down, and which layers get them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from tpcheck.core.errors import UsageError
from tpcheck.core.guides import Guide
from tpcheck.core.installed_source import fields_of
from tpcheck.families.build import FolderModel, small_model

if TYPE_CHECKING:
    from torch import nn

LoraSource: TypeAlias = "int | str | Mapping[str, Any]"
LORA_FORM = (
    "a rank of 1 or more, optionally followed by all-linear, attention or names of layers, and by rslora or dora: "
    "8,attention,rslora; or a dict of fields of peft.LoraConfig, such as {'r': 8, 'target_modules': 'attention'}"
)

ALL_LINEAR, ATTENTION = "all-linear", "attention"
_VARIANTS = {"rslora": "use_rslora", "dora": "use_dora"}
_INSTALLED = "0, or an installed peft: pip install peft"
_LINEAR = ("Linear", "Conv1D")  # of torch, and of transformers' GPT-2
_OF_ATTENTION = ("attn", "attention")


def lora_fields(source: LoraSource) -> dict[str, Any]:
    """Return the fields of `peft.LoraConfig` that a rank, a text or a mapping stands for.

    Raises:
        UsageError: It has another form.

    Example:
        >>> lora_fields("4,q_proj,v_proj,rslora")
        {'r': 4, 'target_modules': ['q_proj', 'v_proj'], 'use_rslora': True}
        >>> lora_fields({"r": 2, "target_modules": "attention"})
        {'target_modules': 'attention', 'r': 2}
    """
    if isinstance(source, Mapping):
        lora: dict[str, Any] = {"target_modules": ALL_LINEAR, **source}
        rank = lora.get("r", 8)  # peft's default
    else:
        rank_text, *words = (word.strip() for word in str(source).split(","))
        rank = int(rank_text) if rank_text.isdecimal() else None
        targets = [word for word in words if word not in _VARIANTS]
        named = targets[0] if targets in ([ALL_LINEAR], [ATTENTION]) else targets
        lora = {"r": rank, "target_modules": named or ALL_LINEAR}
        lora |= {_VARIANTS[word]: True for word in words if word in _VARIANTS}
        if not all(words) or (len(targets) > 1 and {ALL_LINEAR, ATTENTION} & set(targets)):
            raise UsageError("lora", source, LORA_FORM)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
        raise UsageError("lora", source, LORA_FORM)
    return lora


def require_lora(source: LoraSource) -> None:
    """Check, without importing peft, that it is installed and has the fields that a rank, a text or a mapping names.

    Raises:
        UsageError: It is not, or has no such field.
    """
    named = lora_fields(source)
    if find_spec("peft") is None:
        raise UsageError("lora", source, _INSTALLED, Guide.LORA)
    known = fields_of("peft.tuners.lora.config", "LoraConfig")
    known += tuple(name for base in ("PeftConfig", "PeftConfigMixin") for name in fields_of("peft.config", base))
    for name in named if known else ():
        if name not in known:
            raise UsageError(f"lora[{name!r}]", named[name], known)


def with_adapters(family: str | FolderModel, settings: Mapping[str, object] | None, lora: LoraSource) -> nn.Module:
    """Return a small model with LoRA adapters, which are trained alone.

    Raises:
        UsageError: peft is not installed, or cannot add such adapters to this model.
    """
    named = lora_fields(lora)
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UsageError("lora", lora, _INSTALLED, Guide.LORA) from error
    model = small_model(family, settings)
    if named["target_modules"] == ATTENTION:
        named["target_modules"] = _linear_layers_of_attention(model)
    try:
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**named))
    except Exception as error:
        raise UsageError("lora", lora, f"adapters that peft can add to {family} ({error})", Guide.LORA) from error
    return adapted


def _linear_layers_of_attention(model: nn.Module) -> list[str]:
    """Return the names of the linear layers below modules whose names contain `attn` or `attention`."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in _LINEAR and any(part in name.rpartition(".")[0].lower() for part in _OF_ATTENTION)
    ]
