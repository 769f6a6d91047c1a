"""The configuration of a model in a folder, made small. Reads no weights, and no code of the folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpcheck.core.errors import UsageError
from tpcheck.families.build import HEADS, FolderModel, Head, is_type, types_of
from tpcheck.families.proportions import proportional_settings
from tpcheck.families.rules import OVERRIDES, SPECIAL_TOKENS
from tpcheck.families.settings import attributes, canonical, nest, overlay, unknown

CONFIG = "config.json"
_FEW = 4


def find_config(target: str) -> Path:
    """Return the configuration file of a folder, of a file, or of a hub id that is in the local cache.

    Raises:
        UsageError: There is none, with what to do.
    """
    path = Path(target).expanduser()
    if path.is_dir():
        if (path / CONFIG).is_file():
            return path / CONFIG
        inside = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
        where = f"; {', '.join(inside)} inside it {'has' if len(inside) == 1 else 'have'} one" if inside else ""
        raise UsageError("target", target, f"a folder with a {CONFIG}, as save_pretrained writes it{where}")
    if path.is_file():
        return path
    return _cached(target)


def _cached(target: str) -> Path:
    """Return the configuration of a hub id in the local cache. Never asks the hub."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise UsageError("target", target, "a family, a folder that exists, or file.py:build") from None
    try:
        cached = try_to_load_from_cache(target, CONFIG)
    except HFValidationError:
        raise UsageError("target", target, "a family, a folder or config.json that exists, or file.py:build") from None
    if isinstance(cached, str):
        return Path(cached)
    raise UsageError(
        "target",
        target,
        "a family, a folder or config.json that exists, or a model of the hub that is in the local cache; tpcheck "
        f"downloads nothing: `hf download {target} {CONFIG}` gets its configuration, which is all that it reads",
    )


def read_folder(target: str, settings: Mapping[str, object], *, tp: int, full: bool = False) -> FolderModel:
    """Return the model of a folder's configuration, small unless `full`, with the user's settings over it.

    Args:
        target: A folder of transformers, its config.json, or a hub id that is in the local cache.
        settings: As for `build.small_model`.
        tp: The TP size of the run: what it divides it divides in the small model, too.
        full: Keep all sizes.

    Raises:
        UsageError: There is no such configuration, or this transformers has no such model type.
    """
    path = find_config(target)
    raw = _parsed(target, path)
    name = _model_type(target, raw)
    head, notes = _head(name, raw)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw, of_weights = _without_weights(raw)
    try:
        real = CONFIG_MAPPING[name].from_dict(dict(raw))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UsageError("target", target, f"a configuration that transformers reads ({reason})") from error
    config, shrunk = _changed(real, nest(settings), tp=tp, full=full, of_type=OVERRIDES.get(name, {}), head=head)
    family = name if head is _heads_of(name)[0] else f"{name}/{head.name}"
    return FolderModel(target, family, config, shrunk, (*notes, *of_weights))


def _parsed(target: str, path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("target", target, f"valid JSON in {path.name} ({error})") from error
    if not isinstance(raw, dict):
        raise UsageError("target", target, f"a JSON object in {path.name}")
    from transformers import PreTrainedConfig

    decoded: dict[str, Any] = PreTrainedConfig.get_config_dict(str(path))[0]  # which writes infinities its own way
    return decoded


def _model_type(target: str, raw: Mapping[str, Any]) -> str:
    name = raw.get("model_type")
    if isinstance(name, str) and is_type(name):
        return name
    if not isinstance(name, str):
        raise UsageError("target", target, "a configuration of transformers, which has a model_type")
    types = {of_head for head in HEADS for of_head in types_of(head)}
    what = unknown(f"a model_type of the installed transformers, not {name!r}", name, types)
    if raw.get("auto_map"):
        what += (
            "; the folder's own code (auto_map) is never run: write a function that builds the model, and give "
            "file.py:function in place of the folder"
        )
    raise UsageError("target", target, what)


def _heads_of(name: str) -> list[Head]:
    return [head for head in HEADS if name in types_of(head)]


def _head(name: str, raw: Mapping[str, Any]) -> tuple[Head, list[str]]:
    """Return the head of the folder's architecture, and notes on what of it is not built."""
    architecture = next(iter(raw.get("architectures") or ()), None)
    notes = []
    if raw.get("auto_map"):
        notes.append("the folder's own code (auto_map) is not run: the class of transformers is verified")
    for head in _heads_of(name):
        if architecture is None or architecture in _names_of(head, name):
            return head, notes
    head = _heads_of(name)[0]
    if not raw.get("auto_map"):
        built = _names_of(head, name)[0]
        notes.append(f"{architecture} is not built: {built}, whose loss is that of a language model, is verified")
    return head, notes


def _names_of(head: Head, name: str) -> tuple[str, ...]:
    """Return the names of the classes that a model type has with a head."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, head.mapping)[name]
    return (names,) if isinstance(names, str) else tuple(names)


def _without_weights(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Leave out what says how weights are stored: they are random."""
    stored = ("quantization_config", "dtype", "torch_dtype", "auto_map", "compression_config")
    notes = ["weights are random; those of the folder are not read"]
    if raw.get("quantization_config") or raw.get("compression_config"):
        notes.append("quantization is left out: the weights are those of the unquantized model")
    return {key: value for key, value in raw.items() if key not in stored}, notes


def _changed(
    real: Any,
    wanted: Mapping[str, Any],
    *,
    tp: int,
    full: bool,
    of_type: Mapping[str, Any],
    head: Head,
    path: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Return the configuration with its sizes made small and the user's settings over it, and what was made small."""
    known = _values(real)
    wanted = canonical(real, wanted, path)
    small = _neutral(known)
    if not full:
        small |= proportional_settings(known, tp=tp, of_type=of_type, is_decoder=head.name == "causal")
    nested: dict[str, Any] = {}
    shrunk: dict[str, tuple[Any, Any]] = {}
    for name in real.sub_configs:
        if known.get(name) is not None:
            nested[name], inner = _changed(
                getattr(real, name),
                wanted.pop(name, {}),
                tp=tp,
                full=full,
                of_type=of_type.get(name, {}),
                head=head,
                path=(*path, name),
            )
            shrunk |= inner
            small.pop(name, None)
    for name, value in small.items():
        if name not in wanted and name not in SPECIAL_TOKENS and _is_smaller(value, known[name]):
            shrunk |= dict(_differences(".".join((*path, name)), known[name], value))
    fixed = {name: overlay({name: known.get(name)}, {name: value})[name] for name, value in wanted.items()}
    aliases = real.attribute_map
    changes = {aliases.get(name, name): value for name, value in {**small, **fixed, **nested}.items()}
    whole = {key: value for key, value in real.to_dict().items() if key not in ("_name_or_path", "dtype")}
    return json.loads(json.dumps({**whole, **changes}, default=str)), shrunk


def _values(config: Any) -> dict[str, Any]:
    """Return the attributes of a configuration, those that its file has and its class does not declare included."""
    known = attributes(config)
    return {name: value for name, value in config.to_dict().items() if name[0] != "_" and name not in known} | known


def _neutral(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what both sides do without: dropout, and caches of generation."""
    off: dict[str, Any] = {
        name: 0.0 for name, value in known.items() if ("drop" in name or "jitter" in name) and isinstance(value, float)
    }
    return off | ({"use_cache": False} if "use_cache" in known else {})


def _is_smaller(small: Any, real: Any) -> bool:
    """Return whether a size, or sizes inside a list or a mapping, were changed; switches and dropout are no sizes."""
    return small != real and not isinstance(real, (bool, float)) and isinstance(small, (int, list, dict))


def _differences(name: str, real: Any, small: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield every changed size by dotted name; lists are counted by entry."""
    if isinstance(real, Mapping) and not set(small) <= set(real):  # by layer
        yield name, (f"{len(real)} layers", f"{len(small)} layers")
    elif isinstance(real, Mapping):
        for key, value in small.items():
            if value != real[key]:
                yield from _differences(f"{name}.{key}", real[key], value)
    elif isinstance(real, (list, tuple)):
        yield name, (_counts(real), _counts(small))
    else:
        yield name, (real, small)


def _counts(entries: Sequence[Any]) -> str:
    """Return `22 sliding_attention, 4 full_attention`, or the number of entries where they are many."""
    counts = Counter(map(str, entries))
    if len(counts) > _FEW:
        return f"{len(entries)} entries"
    return ", ".join(
        f"{number} {entry}" if entry[0].isalpha() else f"{number} x {entry}" for entry, number in counts.items()
    )
