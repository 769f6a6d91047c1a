"""The options of a verification: names, defaults, meanings, accepted values, and how subjects and commands spell them.

`verify`, `verify_family`, the command line, the matrix, the fuzzer and `family_tests` take their options from
`RunOptions`. A new option is a field of it, a key of `OptionKeywords`, which mypy needs, and a flag in
`tpcheck/cli/verify.py`. Loads no torch.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar

from tpcheck.backends.limits import require_within_limits
from tpcheck.backends.registry import backend_names, require_library
from tpcheck.core.check_names import CHECK_NAMES, INITIALISATION_CHECK, ON_REQUEST
from tpcheck.core.errors import UsageError
from tpcheck.core.optimizers import require_optimizer
from tpcheck.core.reproduce import verify_command
from tpcheck.core.topology import Topology
from tpcheck.families.adapters import LoraSource, require_lora
from tpcheck.numerics.tolerance import NUM_REPLAYS, Tolerance
from tpcheck.world.world import DEVICES, require_seconds

if TYPE_CHECKING:
    from tpcheck.backends.interface import Backend
    from tpcheck.numerics.verdict import GroupAnswer

_BATCH_FORM = "ROWSxLENGTH, optionally followed by ,padded or ,strided"


@dataclass(frozen=True, slots=True)
class Tokens:
    """The form of synthetic batches.

    Attributes:
        rows: Samples that each DP rank sees in a step.
        length: Tokens of a sample.
        padded: Whether some samples are shorter: an attention mask and the labels exclude the padding.
        strided: Whether tokens and labels are views that are not contiguous, as after `tensor.t()`.

    Example:
        >>> Tokens.parse("3x7,padded")
        Tokens(rows=3, length=7, padded=True, strided=False)
        >>> str(Tokens(2, 16, strided=True))
        '2x16,strided'
    """

    rows: int = 2
    length: int = 16
    padded: bool = False
    strided: bool = False

    @classmethod
    def parse(cls, text: str) -> Tokens:
        """Return the form that a text such as `3x7,padded,strided` describes.

        Raises:
            UsageError: The text has another form.
        """
        sizes, *flags = (part.strip() for part in text.split(","))
        rows, _, length = sizes.partition("x")
        known = set(flags) <= {"padded", "strided"} and len(set(flags)) == len(flags)
        if not (known and rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
            raise UsageError("batch", text, _BATCH_FORM)
        return cls(int(rows), int(length), padded="padded" in flags, strided="strided" in flags)

    def __str__(self) -> str:
        flags = [name for name in ("padded", "strided") if getattr(self, name)]
        return ",".join([f"{self.rows}x{self.length}", *flags])


OptimizerSource: TypeAlias = "str | Mapping[str, Any] | Callable[..., Any]"
BatchSource: TypeAlias = "Mapping[str, Any] | Callable[[Mapping[str, int], int], Mapping[str, Any]] | Tokens | None"
COMMON_DTYPES = ("float64", "float32", "bfloat16")
"""Those in which every fault can be injected; float16 has losses scaled under DeepSpeed."""
DTYPES = (*COMMON_DTYPES, "float16")
ZERO_STAGES = (0, 1, 2, 3)
LOSSES = ("mean", "token_mean")
LOOPS = ("plain", "trainer")
_TRAINER_BACKENDS = ("deepspeed", "transformers")
ATTENTIONS = ("eager", "sdpa", "flex_attention")
EXPERTS = ("eager", "grouped_mm", "batched_mm")

_F = TypeVar("_F", bound=Callable[..., Any])


def _doc(text: str) -> dict[str, str]:
    return {"doc": text}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options of a verification; the text beside each default is its documentation, the first sentence its help.

    Example:
        >>> RunOptions(zero_stage=1).command("llama")
        'tpcheck verify llama --tp 2 --zero 1'
    """

    topology: Topology = field(default=Topology(tp=2), metadata=_doc("Sizes of the parallel axes."))
    backend: str | Backend = field(
        default="deepspeed",
        metadata=_doc(
            "What shards the model. `deepspeed`, the name of another installed backend, or an object with the methods "
            "of `tpcheck.adapters.Backend`."
        ),
    )
    dtype: str = field(
        default="float64",
        metadata=_doc(
            "`float64` separates bugs from rounding best. Also `float32`, `bfloat16`, `float16` (with "
            "DeepSpeed under its loss scale)."
        ),
    )
    device: str | None = field(
        default=None,
        metadata=_doc(
            "Where ranks compute: `cpu` or `cuda`. None for CUDA where every rank has its own GPU, else the CPU; with "
            "`cuda`, ranks share GPUs if there are fewer."
        ),
    )
    steps: int = field(
        default=2, metadata=_doc("Training steps. The comparison ends after the first one that differs.")
    )
    zero_stage: int = field(default=0, metadata=_doc("ZeRO stage of the backend, 0 to 3."))
    optimizer: OptimizerSource = field(
        default="sgd",
        hash=False,
        metadata=_doc(
            'The optimizer of both sides: a class of torch.optim by name, in any case, or `{"type": "AdamW", "params": '
            "{...}}` as DeepSpeed writes it. Also a callable (parameters) -> torch.optim.Optimizer. SGD (with momentum "
            "and weight decay) is the default because a wrong scale of the gradient is invisible to Adam."
        ),
    )
    accumulate: int = field(
        default=1,
        metadata=_doc("Micro-batches whose gradients each step accumulates; `batch` gives one micro-batch at a time."),
    )
    loss: str = field(
        default="mean",
        metadata=_doc(
            "How the losses of a step become one. `mean`: the mean over replicas and micro-batches of what the model "
            "returns. `token_mean`: the sum over all labels of the step divided by their number; a model whose forward "
            "takes `num_items_in_batch` is given that number."
        ),
    )
    attention: str | None = field(
        default=None,
        metadata=_doc("Attention of the sharded model: `eager`, `sdpa`, `flex_attention`. None for the model's own."),
    )
    experts: str | None = field(
        default=None,
        metadata=_doc("Experts of the sharded model: `eager`, `grouped_mm`, `batched_mm`. None for the model's own."),
    )
    checkpointing: bool = field(
        default=False, metadata=_doc("Recompute activations of the sharded model in the backward pass.")
    )
    reentrant: bool = field(
        default=False, metadata=_doc("Recompute them by re-entering autograd, torch's older way (`use_reentrant`).")
    )
    compile: bool = field(default=False, metadata=_doc("Compile the sharded model with torch.compile."))
    compile_layers: bool = field(
        default=False, metadata=_doc("Compile each layer of the sharded model by itself, in place of the whole.")
    )
    lora: LoraSource = field(
        default=0,
        hash=False,
        metadata=_doc(
            "LoRA adapters on a family's model, trained alone: the rank, 0 for none. `8` is on all linear layers, "
            "`8,attention` and `8,q_proj,v_proj` are on some, `8,rslora` and `8,dora` are variants; a dict has fields "
            "of peft.LoraConfig, in which `target_modules` may be `attention`, too."
        ),
    )
    loop: str = field(
        default="plain",
        metadata=_doc("What drives the steps. `plain` for a loop of one's own, `trainer` for transformers' Trainer."),
    )
    config: Mapping[str, Any] = field(
        default_factory=dict,
        hash=False,
        metadata=_doc("Backend configuration, merged over tpcheck's own. For DeepSpeed, its config dict."),
    )
    checks: tuple[str, ...] | None = field(
        default=None,
        metadata=_doc(
            "Names of the checks to run, or `all`. None for all but three: `initialisation_matches_reference` makes "
            "models from scratch under many seeds, and compares what is drawn with the unsharded model; "
            "`checkpoint_matches_reference` saves the model in each way that the backend has, reads it back, and "
            "compares, before the first step and after the last; `resume_matches_uninterrupted` saves the training, "
            "goes on from it in new processes, and compares."
        ),
    )
    seed: int = field(default=0, metadata=_doc("Seed of weights, batches and replays."))
    settings: Mapping[str, Any] = field(
        default_factory=dict,
        hash=False,
        metadata=_doc('Changes to the model\'s configuration, such as `{"qk_layernorm": True}`.'),
    )
    batch: BatchSource = field(
        default=None,
        hash=False,
        metadata=_doc(
            'Samples and tokens that a DP rank sees. `"3x7,padded,strided"` is three samples of seven tokens, some of '
            'them padding, in memory that is not contiguous; None is `"2x16"`.'
        ),
    )
    full: bool = field(
        default=False, metadata=_doc("Keep the real sizes of a folder's configuration, in place of small ones.")
    )
    ignore_plan: bool = field(
        default=False,
        metadata=_doc("Drop the model's own tp_plan, so that the backend's heuristics decide what is sharded."),
    )
    replays: int = field(
        default=NUM_REPLAYS,
        metadata=_doc("Perturbed replays of the reference that measure the allowed error; fewer may allow less."),
    )
    timeout: float = field(default=600.0, metadata=_doc("Seconds until a run that hangs is ended."))

    @classmethod
    def of(cls, **keywords: Any) -> RunOptions:
        """Return the options that keyword arguments give, each as users write it: None for an empty dict, lists, text.

        Raises:
            UsageError: A value has the wrong type.
        """
        for name in ("config", "settings"):
            if name in keywords:
                value = keywords[name]
                if value is not None and not isinstance(value, Mapping):
                    raise UsageError(name, value, "a dict, or None")
                keywords[name] = dict(value or {})
        checks, batch, lora = (keywords.get(name) for name in ("checks", "batch", "lora"))
        if isinstance(checks, str):
            raise UsageError("checks", checks, "a list of names")
        keywords["checks"] = None if checks is None else tuple(checks)
        batch = Tokens.parse(batch) if isinstance(batch, str) else batch
        keywords["batch"] = None if batch == Tokens() else batch
        if isinstance(lora, str):
            keywords["lora"] = int(lora) if lora.strip().isdecimal() else lora.replace(" ", "")
        return cls(**keywords)

    @property
    def backend_name(self) -> str:
        return self.backend if isinstance(self.backend, str) else self.backend.name

    @property
    def check_names(self) -> tuple[str, ...]:
        """The checks to run, the default ones included."""
        if self.checks is None:
            return CHECK_NAMES
        return (*CHECK_NAMES, *ON_REQUEST) if self.checks == ("all",) else self.checks

    def keywords(self) -> dict[str, Any]:
        """Return all options as keyword arguments of `verify_family`."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def subject(self, family: str | None = None) -> dict[str, Any]:
        """Return the subject of a report: the main options, and the others if they differ from their defaults.

        Args:
            family: The model type; None for a caller's model, whose settings and batch are not options.
        """
        values, defaults = self._flags(), DEFAULTS._flags()
        always = _ALWAYS_IN_SUBJECT if family is None else (*_ALWAYS_IN_SUBJECT, "settings")
        never = _NEVER_IN_SUBJECT if family is not None else (*_NEVER_IN_SUBJECT, "settings", "batch")
        changed = [name for name in values if name not in (*always, *never) and values[name] != defaults[name]]
        return {
            **({} if family is None else {"family": family}),
            **{name: values[name] for name in (*always, *changed)},
        }

    def command(self, family: str) -> str | None:
        """Return the command that repeats this run; None where JSON cannot hold its settings or configuration."""
        defaults = {**DEFAULTS.subject(family), "tp": None}  # tp is always given
        subject = self.subject(family)
        return verify_command(family, {name: subject[name] for name in subject if subject[name] != defaults.get(name)})

    def _flags(self) -> dict[str, Any]:
        """Return the options by the names of their flags, in values that JSON holds."""
        values = self.keywords()
        topology, zero_stage = values.pop("topology"), values.pop("zero_stage")
        are_default = self.checks is None or self.checks == CHECK_NAMES
        return {
            **values,
            "backend": self.backend_name,
            "tp": topology.tp,
            "dp": topology.dp,
            "zero": zero_stage,
            **{name: _plain_dict(values[name]) for name in ("optimizer", "lora")},
            "config": dict(self.config),
            "settings": dict(self.settings),
            "checks": None if are_default else list(self.checks or ()),
            "batch": str(self.batch) if isinstance(self.batch, Tokens) else None,
        }


def _plain_dict(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


DEFAULTS = RunOptions()


def option_help(name: str, sentences: int = 1) -> str:
    """Return the help of the flag of an option: the first sentences of its documentation.

    Example:
        >>> option_help("steps")
        'Training steps.'
    """
    texts: dict[str, str] = {option.name: option.metadata["doc"] for option in fields(RunOptions)}
    return ". ".join(texts[name].replace("`", "").split(". ")[:sentences]).removesuffix(".") + "."


_ALWAYS_IN_SUBJECT = ("backend", "tp", "dp", "zero", "dtype", "steps", "seed", "config", "ignore_plan")
_NEVER_IN_SUBJECT = ("replays", "timeout")


class OptionKeywords(TypedDict, total=False):
    """The options that `verify`, `verify_family` and `family_tests` share, for type checkers."""

    device: str | None
    steps: int
    optimizer: OptimizerSource
    accumulate: int
    loss: str
    attention: str | None
    experts: str | None
    checkpointing: bool
    reentrant: bool
    compile: bool
    compile_layers: bool
    loop: str
    config: Mapping[str, Any] | None
    checks: Sequence[str] | None
    seed: int
    ignore_plan: bool
    replays: int
    timeout: float


class FamilyKeywords(OptionKeywords, total=False):
    """`OptionKeywords`, plus options that apply only to model families."""

    settings: Mapping[str, Any] | None
    batch: Tokens | str | None
    full: bool
    lora: LoraSource


def expand_options(keywords: type) -> Callable[[_F], _F]:
    """Return a decorator that spells out a function's `**options` in its signature and its docstring.

    Args:
        keywords: The TypedDict that annotates `**options`. The docstring has `{options}` in the place of their list.
    """

    def decorate(function: _F) -> _F:
        signature = _expanded_signature(inspect.signature(function), keywords.__annotations__)

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in signature.parameters:
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*args, **kwargs)

        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        wrapper.__doc__ = (function.__doc__ or "").replace("{options}", _documented(signature))
        return wrapper  # type: ignore[return-value]

    return decorate


def _expanded_signature(signature: inspect.Signature, types: Mapping[str, Any]) -> inspect.Signature:
    """Return the signature with parameters of these types for `**options`, in the order of `RunOptions`."""
    parameters = list(signature.parameters.values())
    keywords = {
        parameter.name: parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    options = {}
    for option in fields(RunOptions):
        if option.name in keywords:
            options[option.name] = keywords.pop(option.name)
        elif option.name in types:
            default = None if option.default is MISSING else option.default
            annotation = types[option.name].__forward_arg__
            options[option.name] = inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
    positional = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return signature.replace(parameters=[*positional, *options.values(), *keywords.values()])


def _documented(signature: inspect.Signature) -> str:
    """Return the lines of `Args:` for the options of a signature that are keyword-only."""
    texts = [
        f"{option.name}: {option.metadata['doc']}"
        for option in fields(RunOptions)
        if (parameter := signature.parameters.get(option.name)) and parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return "\n".join(
        textwrap.fill(text, 120, initial_indent=" " * 8, subsequent_indent=" " * 12) for text in texts
    ).lstrip()


@dataclass(frozen=True, slots=True)
class Request:
    """One verification, as it travels to the ranks.

    Attributes:
        build: Returns the unsharded model; called on every rank under the same seed.
        options: Every option of the run.
        spread_weights: Redraw matrices on a scale that makes every path of the model count.
        tolerance: What rounding does to the training, where that is known; else it is measured.
        keeps_tolerance: Return what was measured.
    """

    build: Callable[[], Any]
    options: RunOptions
    spread_weights: bool = False
    tolerance: Tolerance | None = None
    keeps_tolerance: bool = False


@dataclass(frozen=True, slots=True)
class RankAnswer:
    """The result of one rank, as it travels back.

    Attributes:
        group: The answer of the rank's TP group, from its first rank; None from the others.
        versions: Versions of the packages under test.
        notes: What of the user's configuration the backend leaves out, in sentences.
        tolerance: What rounding does to the training, from the first rank, where it was measured and is asked for or
            resuming needs it.
    """

    group: GroupAnswer | None
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    tolerance: Tolerance | None = None


def require_valid(request: Request) -> None:
    """Raise UsageError if the model or an option cannot be used, with the accepted values."""
    is_module = hasattr(request.build, "named_parameters") and not isinstance(request.build, type)
    if not callable(request.build) or is_module:  # a module is callable, too
        raise UsageError(
            "build", type(request.build).__name__, "a callable that makes and returns the unsharded torch.nn.Module"
        )
    require_valid_options(request.options)


def require_valid_options(options: RunOptions) -> None:
    """Raise UsageError if an option cannot be used, whatever the model, with the accepted values. Loads no torch."""
    _require_topology(options.topology)
    if not hasattr(options.backend, "shard") and options.backend not in backend_names():
        raise UsageError("backend", options.backend, [*backend_names(), "an object like tpcheck.adapters.Backend"])
    require_library(options.backend_name)
    require_within_limits(options.backend_name, options)
    if options.dtype not in DTYPES:
        raise UsageError("dtype", options.dtype, DTYPES)
    if options.device not in (None, *DEVICES):
        raise UsageError("device", options.device, (None, *DEVICES))
    if options.zero_stage not in ZERO_STAGES:
        raise UsageError("zero_stage", options.zero_stage, ZERO_STAGES)
    for name, value, minimum in (
        ("steps", options.steps, 1),
        ("seed", options.seed, 0),
        ("replays", options.replays, 1),
        ("accumulate", options.accumulate, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**31:
            raise UsageError(name, value, f"an integer from {minimum} to {2**31 - 1}")
    if options.batch is not None and not callable(options.batch) and not isinstance(options.batch, (Mapping, Tokens)):
        raise UsageError("batch", type(options.batch).__name__, "a dict of tensors, a callable or None")
    _require_training(options)
    valid_checks = (*CHECK_NAMES, *ON_REQUEST)
    require_seconds(options.timeout)
    unknown = [name for name in options.check_names if name not in valid_checks]
    if unknown or not options.check_names:
        raise UsageError("checks", unknown or (), ("all", *valid_checks))


def _require_topology(topology: Topology) -> None:
    if not isinstance(topology, Topology):
        raise UsageError("topology", topology, "a tpcheck.Topology")
    if set(topology.axes) != {"dp", "tp"}:
        raise UsageError("topology", topology, "sizes of tp and dp alone: no backend here runs other axes")


def _require_training(options: RunOptions) -> None:
    if options.lora != 0 or isinstance(options.lora, bool):
        require_lora(options.lora)
    if options.loss not in LOSSES:
        raise UsageError("loss", options.loss, LOSSES)
    _require_optimizer(options.optimizer)
    _require_implementations(options)
    _require_loop(options)


def _require_optimizer(optimizer: OptimizerSource) -> None:
    if isinstance(optimizer, Mapping):
        name, params = optimizer.get("type"), optimizer.get("params", {})
        if not isinstance(name, str) or not isinstance(params, Mapping) or not set(optimizer) <= {"type", "params"}:
            raise UsageError("optimizer", dict(optimizer), '{"type": NAME, "params": {...}}')
        require_optimizer(name, params, source=dict(optimizer))
    elif isinstance(optimizer, str):
        require_optimizer(optimizer)
    elif not callable(optimizer):
        accepted = "a name in torch.optim, a dict with type and params, or a callable (parameters) -> Optimizer"
        raise UsageError("optimizer", optimizer, accepted)


def _require_implementations(options: RunOptions) -> None:
    for name, accepted in (("attention", ATTENTIONS), ("experts", EXPERTS)):
        if getattr(options, name) not in (None, *accepted):
            raise UsageError(name, getattr(options, name), accepted)
    for name in ("checkpointing", "reentrant", "compile", "compile_layers"):
        if not isinstance(getattr(options, name), bool):
            raise UsageError(name, getattr(options, name), (False, True))
    if options.reentrant and not options.checkpointing:
        raise UsageError("reentrant", True, "checkpointing beside it, of which it is a kind")
    compiled = next((name for name in ("compile", "compile_layers") if getattr(options, name)), None)
    if (
        compiled is not None and options.checkpointing
    ):  # a float32 cast inside cannot be raised in a graph of two passes
        raise UsageError(compiled, True, "False with checkpointing: compiled modules that recompute are not verified")


def _require_loop(options: RunOptions) -> None:
    if options.loop not in LOOPS:
        raise UsageError("loop", options.loop, LOOPS)
    if options.loop == "plain":
        return
    if options.backend_name not in _TRAINER_BACKENDS:
        accepted = f"plain with backend={options.backend_name}; the Trainer drives {' and '.join(_TRAINER_BACKENDS)}"
        raise UsageError("loop", options.loop, accepted)
    if options.compile:  # its graph is traced in another thread than the recorder's
        raise UsageError("compile", True, "False with loop=trainer, or compile_layers, which is verified there")
    if INITIALISATION_CHECK in options.check_names:  # it makes models without batches to train on
        raise UsageError("checks", INITIALISATION_CHECK, "any other check with loop=trainer")
