"""Pickles, interpreted: plain containers and values, and nothing is ever executed.

A pickle is a program for a small stack machine. Python's own machine imports what a pickle names
and calls it, so that reading a file means running it. This one knows the few instructions that
`torch.save` and TorchScript write; a name in a pickle stands for whatever the caller's table says,
or the file is refused by that name.
"""

from __future__ import annotations

import collections
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from itself_jax.weight_files import source as source_lib

MAX_BYTES = 64 << 20
# Some 35 for an array: forty thousand of them, or five seconds.
MAX_INSTRUCTIONS = 2_000_000

_KEYS = (str, float, bool, bytes, type(None))


class Refused(Exception):
    """What is wrong with a pickle, as the end of a sentence, and some advice."""

    def __init__(self, what: str, advice: str | None = None, *, code: bool = False):
        super().__init__(what)
        self.what = what
        self.advice = advice
        self.code = code  # whether it asks for something that would run


class Name:
    """A global that is allowed, such as `collections.OrderedDict`.

    Attributes:
      name: module and name.
      call: what stands for a call of it, as a function of the arguments; None: it is not called.
    """

    __slots__ = ("name", "call")

    def __init__(self, name: str, call: Callable[..., Any] | None):
        self.name = name
        self.call = call


class Inert:
    """An object that is neither a container nor a number: nothing but what it was."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind


class Module:
    """A module of a TorchScript archive: the name of its class, and its attributes."""

    __slots__ = ("kind", "attributes")

    def __init__(self, kind: str):
        self.kind = kind
        self.attributes: dict[Any, Any] = {}


def load(
    stream: Any,
    lookup: Callable[[str], Name | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Interprets one pickle.

    The result is made of dict, list, tuple, str, bytes, int, float, bool, None, of `Inert` and
    `Module` objects, of names, and of what `persistent` and the callables of `lookup` return.
    Keys of dicts that are no plain values become `Inert` (the hash of a nested tuple can take
    forever, and long numbers can be chosen to collide), and so does every set.

    Args:
      stream: has `read` and `readline`, and ends; it is left behind the pickle.
      lookup: the names that are allowed: what "module.name" stands for, or None.
      persistent: what stands for a persistent id; None: there are none.

    Raises:
      Refused: the pickle asks for anything else, is damaged, or is too large.
    """
    return _Machine(lookup, persistent).run(stream)


def forbidden(name: str) -> Refused:
    """The refusal of a global by its name; also of what is a name only in a text file."""
    return Refused(
        f"asks for {source_lib.bare(name)}, which is code and not an array; nothing of it was run",
        "do not trust this file, or save only the model's state_dict()",
        code=all(part.isidentifier() for part in name.split(".")),
    )


class _Machine:
    def __init__(
        self,
        lookup: Callable[[str], Name | None],
        persistent: Callable[[Any], Any] | None,
    ):
        self._lookup = lookup
        self._persistent = persistent
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # stacks below the marks
        self._memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        bounded = _Bounded(stream)
        count = 0
        try:
            for opcode, argument, _ in pickletools.genops(bounded):
                count += 1
                if count > MAX_INSTRUCTIONS:
                    raise Refused(f"has a pickle of more than {MAX_INSTRUCTIONS} instructions")
                if opcode.name == "STOP":
                    break
                instruction = _INSTRUCTIONS.get(opcode.name)
                if instruction is None:
                    self._refuse_instruction(opcode.name, argument)
                instruction(self, argument)
            result = self._pop()
        except Refused:
            raise
        # `pickletools` raises ValueError and, for odd escapes in a name, warnings.
        except (ValueError, TypeError, LookupError, OverflowError, AssertionError, Warning):
            raise Refused("is damaged: its pickle cannot be read") from None
        if self._stack or self._marked:
            raise Refused("is damaged: its pickle leaves something over")
        return result

    def _refuse_instruction(self, name: str, argument: Any) -> NoReturn:
        if name == "INST":
            raise forbidden(str(argument).replace(" ", "."))
        if name in ("EXT1", "EXT2", "EXT4"):
            raise Refused(
                f"asks for extension {argument} of copyreg, which is code; nothing of it was run",
                code=True,
            )
        raise Refused(
            f"uses the pickle instruction {name}, which weights never need; nothing of it was run",
            "save it anew with torch.save(model.state_dict(), …)",
            code=True,
        )

    def _pop(self) -> Any:
        if not self._stack:
            raise Refused("is damaged: its pickle takes more than it has")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise Refused("is damaged: its pickle takes more than it has")
        return self._stack[-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def _pop_one(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, index: int) -> None:
        self._push(self._memo[index])

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def _marked_tuple(self, _: Any) -> None:
        items = self._pop_mark()
        self._push(tuple(items))

    def _marked_list(self, _: Any) -> None:
        items = self._pop_mark()
        self._push(items)

    def _marked_dict(self, _: Any) -> None:
        items = self._pop_mark()
        self._push({})
        self._set(items)

    def _append(self, _: Any) -> None:
        self._extend([self._pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            raise Refused(f"is damaged: its pickle appends to {source_lib.show(target)}")
        target.extend(items)

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _set_items(self, _: Any) -> None:
        self._set(self._pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict | Inert) or len(items) % 2:
            raise Refused(f"is damaged: its pickle sets items of {source_lib.show(target)}")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key if _is_plain(key) else Inert("key")] = value

    def _add_items(self, _: Any) -> None:
        self._pop_mark()
        if not isinstance(self._top(), Inert):
            raise Refused("is damaged: its pickle adds items to what is no set")

    def _frozen_set(self, _: Any) -> None:
        self._pop_mark()
        self._push(Inert("frozenset"))

    def _global(self, name: str) -> None:
        module, _, attribute = name.partition(" ")
        self._push(self._find(f"{module}.{attribute}"))

    def _stack_global(self, _: Any) -> None:
        attribute, module = self._pop(), self._pop()
        if type(attribute) is not str or type(module) is not str:
            raise Refused("is damaged: its pickle asks for a name that is none")
        self._push(self._find(f"{module}.{attribute}"))

    def _find(self, name: str) -> Name:
        found = self._lookup(name)
        if found is None:
            raise forbidden(name)
        return found

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        self._push(_call(function, arguments))

    def _new(self, _: Any) -> None:
        arguments, kind = self._pop(), self._pop()
        self._push(_call(kind, arguments))

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Module) and isinstance(state, dict):
            target.attributes.update(state)
        elif isinstance(target, Namespace) and isinstance(state, dict):
            target.update(state)
        elif hasattr(target, "set_state"):
            target.set_state(state)
        elif not isinstance(target, Inert | collections.OrderedDict):
            raise Refused(
                f"sets the state of {_named(target)}, which would run code; nothing of it was run",
                code=True,
            )
        # What is left is `_metadata` of a state dict, or belongs to something inert: dropped.

    def _persistent_id(self, _: Any) -> None:
        if self._persistent is None:
            raise Refused("is damaged: its pickle names a storage where there are none")
        self._push(self._persistent(self._pop()))


def _is_plain(key: Any) -> bool:
    """Whether a key of a dict has a hash that is quick, and cannot be chosen to collide."""
    return type(key) in _KEYS or (type(key) is int and -(1 << 63) <= key < 1 << 63)


class Namespace(dict):
    """`argparse.Namespace`: a plain container of settings, which needs none of its code."""


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Name) or function.call is None or type(arguments) is not tuple:
        raise Refused(
            f"calls {_named(function)}, which would run code; nothing of it was run", code=True
        )
    try:
        return function.call(*arguments)
    except TypeError:
        raise Refused(f"is damaged: its pickle calls {function.name} with other arguments") from (
            None
        )


def _named(value: Any) -> str:
    return value.name if isinstance(value, Name) else source_lib.show(value)


class _Bounded:
    """What `pickletools` reads from: never more than MAX_BYTES, whatever a pickle claims."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._left = MAX_BYTES

    def read(self, count: int) -> bytes:
        if count > self._left:
            raise Refused(f"is damaged, or has a pickle of more than {MAX_BYTES >> 20} MB")
        content = self._stream.read(count)
        self._left -= len(content)
        return content

    def readline(self) -> bytes:
        content = self._stream.readline(min(self._left, 4096))
        self._left -= len(content)
        return content


def _push_value(machine: _Machine, value: Any) -> None:
    machine._push(value)


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine._push(make())


def _nothing(machine: _Machine, argument: Any) -> None:
    pass


_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    **{
        name: _push_value
        for name in (
            *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
            *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
            *("BINSTRING", "SHORT_BINSTRING"),  # of Python 2
            *("INT", "LONG", "FLOAT", "STRING", "UNICODE"),  # of protocol 0
        )
    },
    "BYTEARRAY8": _constant(lambda: Inert("bytearray")),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_SET": _constant(lambda: Inert("set")),
    "MARK": _Machine._mark,
    "POP": _Machine._pop_one,
    "POP_MARK": lambda machine, _: machine._pop_mark() and None,
    "PUT": _Machine._put,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "GET": _Machine._get,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "TUPLE": _Machine._marked_tuple,
    "LIST": _Machine._marked_list,
    "DICT": _Machine._marked_dict,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "ADDITEMS": _Machine._add_items,
    "FROZENSET": _Machine._frozen_set,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._new,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent_id,
}
