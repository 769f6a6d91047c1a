"""Functions of the user's, by `file.py:function` or `package.module:function`: imported on the ranks alone."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import tpcheck
from tpcheck.core.errors import UsageError
from tpcheck.families.settings import unknown
from tpcheck.model.options import Request

_FORM = re.compile(r"(?P<source>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_][\w.]*)?$")
_TPCHECK = str(Path(tpcheck.__file__).parent)
CUSTOM = "custom"


def is_user_code(target: str) -> bool:
    """Return whether a target names a function.

    Example:
        >>> [is_user_code(name) for name in ("model.py:build", "package.models:small", "llama", "./folder")]
        [True, True, False, False]
    """
    return ":" in target or target.endswith(".py")


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function that makes a model, beside which its module may have a `batch`, a `shard` and a `layout`.

    Attributes:
        target: As the user gave it.
        source: The file, as an absolute path, or the module's name.
        name: The function's name in it.
        folder: What stands first in `sys.path` while it is imported.
    """

    target: str
    source: str
    name: str
    folder: str

    @classmethod
    def parse(cls, target: str) -> UserFunction:
        """Return the function that a target names. Imports nothing.

        Raises:
            UsageError: The target has another form, or there is no such file.
        """
        form = _FORM.match(target)
        if form is None or form["name"] is None:
            raise UsageError("target", target, "file.py:function or package.module:function")
        if not form["source"].endswith(".py"):
            return cls(target, form["source"], form["name"], str(Path.cwd()))
        path = Path(form["source"]).expanduser()
        if not path.is_file():
            raise UsageError("target", target, f"a file that exists; {path} does not")
        return cls(target, str(path.resolve()), form["name"], str(path.resolve().parent))

    def module(self) -> ModuleType:
        """Import the module, once in a process.

        Raises:
            UsageError: It cannot be imported, with the traceback of the user's code.
        """
        if self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        try:
            return self._file() if self.source.endswith(".py") else importlib.import_module(self.source)
        except (Exception, SystemExit) as error:
            raise self._raised("a module that can be imported", error) from None

    def _file(self) -> ModuleType:
        name = Path(self.source).stem
        imported = sys.modules.get(name)
        if imported is not None and getattr(imported, "__file__", None) == self.source:
            return imported
        if imported is not None or not name.isidentifier():  # another module has this name
            name = "tpcheck_target_" + re.sub(r"\W", "_", name)
            if name in sys.modules:
                return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, self.source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def __call__(self) -> Any:
        """Import the function and return the model that it makes.

        Raises:
            UsageError: There is no such function, it needs arguments, raises, or makes no module.
        """
        from torch import nn

        function = self._function()
        try:
            model = function()
        except (Exception, SystemExit) as error:
            raise self._raised("a function that makes a model", error) from None
        if not isinstance(model, nn.Module):
            made = type(model).__name__
            raise UsageError("target", self.target, f"a function that returns a torch.nn.Module; it returned {made}")
        return model

    def _function(self) -> Any:
        found: Any = self.module()
        for part in self.name.split("."):
            if not hasattr(found, part):
                known = [name for name in vars(found) if name[0] != "_" and callable(getattr(found, name))]
                what = unknown(f"a function of {Path(self.source).name}, which has no {part}", part, known)
                raise UsageError("target", self.target, what)
            found = getattr(found, part)
        is_model = hasattr(found, "named_parameters") and not isinstance(found, type)
        if not callable(found) or is_model:
            kind = type(found).__name__
            raise UsageError("target", self.target, f"a function that makes a new model at each call; it is a {kind}")
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise UsageError(
                "target", self.target, f"a function without arguments ({error}): write one that calls it with them"
            ) from None
        except ValueError:  # of a builtin, which has no signature
            pass
        return found

    def _raised(self, expected: str, error: BaseException) -> UsageError:
        summary = traceback.TracebackException.from_exception(error)
        _leave_out_tpcheck(summary)
        text = "".join(summary.format()).rstrip()
        return UsageError("target", self.target, f"{expected}; it raised {type(error).__name__}: {error}\n{text}")


def _leave_out_tpcheck(summary: traceback.TracebackException) -> None:
    """Leave the frames of the user's code and of the libraries that it calls."""
    frames = [frame for frame in summary.stack if not _is_of_importing(frame.filename)]
    summary.stack = traceback.StackSummary.from_list(frames)
    for chained in (summary.__cause__, summary.__context__):
        if chained is not None:
            _leave_out_tpcheck(chained)


def _is_of_importing(filename: str) -> bool:
    return filename.startswith((_TPCHECK, "<frozen importlib")) or filename == importlib.__file__


def with_user_code(request: Request) -> Request:
    """Return a rank's request with what the user's module has beside the function: `batch`, `shard` and `layout`.

    Raises:
        UsageError: The module cannot be imported, or has no `shard` for the backend `custom`.
    """
    function, options = request.build, request.options
    if not isinstance(function, UserFunction):
        return request
    module = function.module()
    if options.batch is None and hasattr(module, "batch"):
        options = replace(options, batch=module.batch)
    if options.backend == CUSTOM:
        options = replace(options, backend=_custom_backend(function, module))
    return replace(request, options=options)


def _custom_backend(function: UserFunction, module: ModuleType) -> Any:
    from tpcheck.backends.registry import load_backend

    if not callable(getattr(module, "shard", None)):
        source = Path(function.source).name
        raise UsageError("backend", CUSTOM, f"a function shard(model, rank) in {source}, which shards the model")
    configured: Any = load_backend(CUSTOM)
    return replace(configured, shard_model=module.shard, layout=getattr(module, "layout", None))
