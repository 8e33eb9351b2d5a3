"""Sees to it that a model in an open context runs through the context's hooks, or is refused.

Hooks are passed by in silence where a graph was captured without them, where somebody calls a
module's ``forward`` instead of the module, and where a module was exchanged; they are mixed up
where several threads run the model; and a copy of the model takes them along.  Here is what is done
about each of these:

* `eagerly` has code behind ``torch.compile`` run as it is written, whenever it was compiled;
* `Guard` sends direct calls of ``forward`` through the hooks, and raises where a forward reached
  the inner modules past them;
* it refuses threads that do not belong to the context;
* `plain_copies` leaves out of copies what is marked as `Ours`.
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
    "continuous batching (generate_batch and its paged KV caches) takes prompts of text alone and "
    "is not supported inside a compress context; call model.generate with a batch, or leave the "
    "context."
)


# -- what a context puts on a module -------------------------------------------------------------


class Ours:
    """A hook, or an attribute of one module, that an open context put there.

    Attributes:
        call: What is called.
        before: What the attribute was before, if the module had one of its own.
        original: What the attribute stood for before.
    """

    def __init__(self, call: Callable[..., Any], before: Any = None, original: Any = None) -> None:
        self.call, self.before, self.original = call, before, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@contextmanager
def shadowed(module: nn.Module, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """While open, the attribute ``name`` of this module alone is ``call``.

    Whoever still holds it afterwards calls the original.
    """
    mine = Ours(call, module.__dict__.get(name), getattr(module, name))
    functools.update_wrapper(mine, mine.original, updated=())  # generate reads signatures
    setattr(module, name, mine)
    try:
        yield
    finally:
        mine.call = mine.original
        if module.__dict__.get(name) is mine:  # nobody has put another one in its place
            delattr(module, name)
            if mine.before is not None:
                setattr(module, name, mine.before)


@contextmanager
def plain_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, ``copy.deepcopy``, ``pickle`` and ``torch.save`` leave out what is `Ours`.

    All three ask the module itself how to take it apart.
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
        return found  # its class copies it in a way of its own
    make, args, state, *rest = found
    return make, args, _without_ours(state), *rest


def _without_ours(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module as they are outside the context."""
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


_eager: list[Any] = []  # the stance that was set, once for each open context


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """While any is open, what `torch.compile` has compiled runs as plain PyTorch, everywhere.

    A graph that was captured without hooks is replayed without them, for dynamo does not look
    whether hooks have come (``torch._dynamo.config.skip_nnmodule_hook_guards``).

    Raises:
        UserError: Opened by code that is being compiled itself.
    """
    if _is_compiled(model):
        warnings.warn(
            "this model or a part of it was compiled; inside a compress context it runs eagerly, "
            "with the same answers but not as fast.",
            stacklevel=5,
        )
    with _lock:
        try:
            # `set_stance` knows no nesting that is not last in, first out.
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
    """The error for a forward that did not run, or not through the hooks, in ``what``."""
    return UserError(
        f"a forward got past the hooks on {what}, so that it was not compressed.  Something holds "
        "it captured (a CUDA graph, a traced module), has exchanged it or a forward, or has taken "
        "its hooks away.  Undo that, or open the compress context afterwards, on a model that "
        "calls its modules."
    )


_inside: ContextVar[frozenset[object]] = ContextVar("tokenprune_inside", default=frozenset())


class _Here(threading.local):
    """What a thread's forwards have passed, by the index of the module.

    Attributes:
        fired: How often its hooks have run.
        before: How often those of the next one in had run when it began.
        hooked: Whether its hooks have run and its ``forward`` comes next.
        sent: Whether a call of its ``forward`` was sent through the hooks.
    """

    def __init__(self) -> None:
        self.fired: Counter[int] = Counter()
        self.before: dict[int, int] = {}
        self.hooked: set[int] = set()
        self.sent: set[int] = set()


class Guard:
    """Watches the forwards of one model while a context is open.

    Args:
        adapter: The model; its language model, the layers and what is around them have hooks.
        alone: Whether only the thread that opens the context may run the model.

    Attributes:
        modules: From the outside in, each called by the one before.
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
        """Open it behind the context's own hooks, so that they have run when a forward begins."""
        with ExitStack() as stack:
            for index, module in enumerate(self.modules):
                hook = Ours(functools.partial(self._came, index))
                stack.callback(module.register_forward_pre_hook(hook).remove)
                hook = Ours(functools.partial(self._went, index))
                stack.callback(module.register_forward_hook(hook).remove)
                forward = functools.partial(self._forward, index, module.forward)
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
        """Raise `UserError` in a thread or task that does not belong to the context."""
        if self.token not in _inside.get():
            raise UserError(
                "this model runs inside a compress context that another thread or task has opened, "
                "and nothing says whether this one wants compressed answers.  To take part, start "
                "the thread with target=contextvars.copy_context().run (its first argument is the "
                "function to run); for plain answers use a copy of the model, or wait for the "
                "context to end.  A model spread over devices by DataParallel runs in threads of "
                "its own: use one process for each device."
            )
        if self.owner not in (None, threading.get_ident()):
            raise UserError("a context that shares a Prefix runs in the thread that opened it.")

    def _came(self, index: int, module: nn.Module, args: Any) -> None:
        self.admit()
        if [*self.adapter.decoder_layers] != self.layers:
            raise bypassed("a decoder layer")
        here = self.here
        here.hooked.add(index)
        here.fired[index] += 1
        here.before[index] = here.fired[index + 1]

    def _went(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        here, inner = self.here, index + 1
        here.hooked.discard(index)  # there still if a forward has taken the place of `_forward`
        if inner < len(self.modules) and here.before.get(index) == here.fired[inner]:
            raise bypassed(type(self.modules[inner]).__name__)

    def _forward(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here, module = self.here, self.modules[index]
        if index in here.hooked:
            here.hooked.discard(index)
            return original(*args, **kwargs)
        if index in here.sent:
            raise bypassed(type(module).__name__)
        here.sent.add(index)  # somebody called module.forward
        try:
            return module(*args, **kwargs)
        finally:
            here.sent.discard(index)


def _refuse_paged(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(PAGED)
