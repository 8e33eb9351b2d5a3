"""Ensures that a model in an open context runs through the context's hooks, or is refused.

PyTorch skips hooks silently if a graph was captured without them, if code calls a module's
``forward`` instead of the module, or if a module was replaced.  Hooks also run in every thread that
uses the model, and a copy of the model contains them.  Each case is handled:

* `eagerly` runs code compiled by ``torch.compile`` as plain PyTorch;
* `Guard` redirects direct calls of ``forward`` to the module, and raises if a forward reached the
  inner modules without the hooks;
* `Guard` refuses threads that do not belong to the context;
* `plain_copies` leaves everything that is marked as `Ours` out of copies.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from tokenprune.errors import UserError

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = [
    "PAGED",
    "Guard",
    "Ours",
    "bypassed",
    "eagerly",
    "plain_copies",
    "shadowed",
]


PAGED = (
    "continuous batching (generate_batch and its paged KV caches) takes text-only prompts and is "
    "not supported inside a compress context; call model.generate with a batch, or leave the "
    "context."
)


# -- hooks and attributes of a context -----------------------------------------------------------


class Ours:
    """A hook or an attribute that an open context has put on a module.

    Attributes:
        call: The function that is called.
        before: The instance attribute of the module that it replaces, or None.
        original: The previous value of the attribute, from the instance or the class.
    """

    def __init__(self, call: Callable[..., Any], before: Any = None, original: Any = None) -> None:
        self.call, self.before, self.original = call, before, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@contextmanager
def shadowed(module: nn.Module, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """While open, the attribute ``name`` of this module instance is ``call``.

    A reference to it that is kept after the context calls the original.
    """
    mine = Ours(call, module.__dict__.get(name), getattr(module, name))
    functools.update_wrapper(mine, mine.original, updated=())  # generate reads signatures
    setattr(module, name, mine)
    try:
        yield
    finally:
        mine.call = mine.original
        if module.__dict__.get(name) is mine:  # other code may have replaced it
            delattr(module, name)
            if mine.before is not None:
                setattr(module, name, mine.before)


@contextmanager
def plain_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, ``copy.deepcopy``, ``pickle`` and ``torch.save`` leave out every `Ours`.

    All three call ``__reduce_ex__`` of the module.
    """
    modules = [*dict.fromkeys(modules)]
    for module in modules:
        module.__dict__["__reduce_ex__"] = Ours(functools.partial(_reduced, module))
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("__reduce_ex__", None)


def _reduced(module: nn.Module, protocol: Any) -> Any:
    found = type(module).__reduce_ex__(module, protocol)
    if not isinstance(found, tuple) or len(found) < 3 or not isinstance(found[2], dict):
        return found  # the class defines its own way of copying
    make, args, state, *rest = found
    return make, args, without_ours(state), *rest


def without_ours(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module without those of the context."""
    hooks = {k: held for k, held in state.items() if "_hooks" in k and isinstance(held, dict)}
    gone = {key for held in hooks.values() for key in held if isinstance(held[key], Ours)}
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if name in hooks:
            kept[name] = type(value)((key, hook) for key, hook in value.items() if key not in gone)
        elif not isinstance(value, Ours):
            kept[name] = value
        elif value.before is not None:
            kept[name] = value.before
    return kept


# -- compiled code -------------------------------------------------------------------------------

_lock = threading.Lock()


_eager: list[Any] = []  # the stance of `torch.compiler`, one entry per open context


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """While any such context is open, all code compiled by `torch.compile` runs as plain PyTorch.

    A graph captured without hooks would run without them, because dynamo does not guard on new
    hooks (``torch._dynamo.config.skip_nnmodule_hook_guards``).

    Raises:
        UserError: A compiled function opens the context.
    """
    if _is_compiled(model):
        warnings.warn(
            "this model or a part of it was compiled; inside a compress context it runs eagerly, "
            "with the same answers but more slowly.",
            stacklevel=5,
        )
    with _lock:
        try:
            # `set_stance` supports nesting in last-in, first-out order only.
            _eager.append(_eager[0] if _eager else torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:
            raise UserError(
                "a compress context cannot be opened by a compiled function; open it around the "
                "call of that function."
            ) from error
    try:
        yield
    finally:
        with _lock:
            stance = _eager.pop()
            if not _eager:
                stance.__exit__(None, None, None)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


# -- forwards and threads ------------------------------------------------------------------------


def bypassed(what: str) -> UserError:
    """The error for a forward of ``what`` that did not run, or did not run through the hooks."""
    return UserError(
        f"a forward got past the hooks on {what}, so that it was not compressed.  It was captured "
        "(a CUDA graph, a traced module), or the module, its forward or its hooks were replaced or "
        "removed.  Undo that, or make the change before the compress context opens, on a model "
        "that calls its modules."
    )


_inside: ContextVar[frozenset[object]] = ContextVar("tokenprune_inside", default=frozenset())


class _Here(threading.local):
    """The progress of a thread's forwards, by index of the module.

    Attributes:
        fired: Number of times that the module's hooks have run.
        before: `fired` of the next inner module at the start of the module's forward.
        hooked: Modules whose hooks have run and whose ``forward`` is next.
        sent: Modules for which a direct call of ``forward`` was redirected to the module.
    """

    def __init__(self) -> None:
        self.fired: Counter[int] = Counter()
        self.before: dict[int, int] = {}
        self.hooked: set[int] = set()
        self.sent: set[int] = set()


class Guard:
    """Watches the forwards of one model while a context is open.

    Args:
        adapter: Adapter of the model, whose language model and outer modules have hooks.
        alone: Whether only the thread that opens the context may run the model.

    Attributes:
        modules: From outer to inner, each called by the one before.
    """

    def __init__(self, adapter: Adapter, *, alone: bool = False) -> None:
        self.adapter = adapter
        self.modules: list[nn.Module] = [
            *dict.fromkeys((adapter.model, adapter.base, adapter.language_model))
        ]
        self.layers = [*adapter.decoder_layers]
        self.owner = threading.get_ident() if alone else None
        self.token = object()
        self.here = _Here()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, forwards are watched.  Open it after the context's hooks are installed."""
        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                hook = Ours(functools.partial(self.enter, index))
                stack.callback(module.register_forward_pre_hook(hook).remove)
                hook = Ours(functools.partial(self.leave, index))
                stack.callback(module.register_forward_hook(hook).remove)
                forward = functools.partial(self.forward, index, module.forward)
                stack.enter_context(shadowed(module, "forward", forward))
            outer = self.modules[0]
            if hasattr(outer, "init_continuous_batching"):
                stack.enter_context(shadowed(outer, "init_continuous_batching", _refuse_paged))
            _inside.set(_inside.get() | {self.token})
            try:
                yield
            finally:
                _inside.set(_inside.get() - {self.token})

    def admit(self) -> None:
        """Raise `UserError` in a thread or task outside the context."""
        if self.token not in _inside.get():
            raise UserError(
                "this model runs inside a compress context that another thread or task has opened. "
                "To run compressed as well, start the thread with "
                "target=contextvars.copy_context().run (its first argument is the function to "
                "run); for uncompressed answers use a copy of the model, or run it after the "
                "context is closed.  DataParallel runs the model in one thread per device: use one "
                "process per device instead."
            )
        if self.owner not in (None, threading.get_ident()):
            raise UserError("a context that shares a Prefix runs in the thread that opened it.")

    def enter(self, index: int, module: nn.Module, args: Any) -> None:
        """In front of a module: refuse other threads and replaced layers."""
        self.admit()
        if [*self.adapter.decoder_layers] != self.layers:
            raise bypassed("a decoder layer")
        here = self.here
        here.hooked.add(index)
        here.fired[index] += 1
        here.before[index] = here.fired[index + 1]

    def leave(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        """After a module: refuse a forward that did not run through the inner module's hooks."""
        here, inner = self.here, index + 1
        here.hooked.discard(index)  # still present if other code has replaced `forward`
        if inner < len(self.modules) and here.before.get(index) == here.fired[inner]:
            raise bypassed(type(self.modules[inner]).__name__)

    def forward(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replace a module's ``forward``: run direct calls through the hooks."""
        here, module = self.here, self.modules[index]
        if index in here.hooked:
            here.hooked.discard(index)
            return original(*args, **kwargs)
        if index in here.sent:
            raise bypassed(type(module).__name__)
        here.sent.add(index)  # the caller used module.forward
        try:
            return module(*args, **kwargs)
        finally:
            here.sent.discard(index)


def _refuse_paged(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(PAGED)
