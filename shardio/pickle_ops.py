"""The pickle opcodes (protocols 0 to 5) on inert values, after CPython's table.

The table is in ``pickletools``. Each handler gets the machine and moves it one instruction on.
Calls go to ``Machine.call`` only; REDUCE, NEWOBJ, INST and OBJ are therefore the same thing here.
Extension codes and out-of-band buffers are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from .pickle_guard import brief
from .pickle_machine import Machine
from .pickle_numpy import set_numpy_state
from .pickle_text import MAX_INT_BYTES, decode_py2, text_float, text_int, text_string
from .records import Record, StoredTensor

MAX_MARKS = 20_000
_U32, _U64, _F64 = (struct.Struct(c).unpack for c in ("<I", "<Q", ">d"))


def op_mark(m: Machine) -> None:
    if len(m.marks) >= MAX_MARKS:
        m.guard.fail("nested too deeply")
    m.marks.append(len(m.stack))


def op_pop(m: Machine) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.stack.pop()


def op_dup(m: Machine) -> None:
    m.stack.append(m.stack[-1])


def op_proto(m: Machine) -> None:
    if (version := m.take(1)[0]) > 5:
        m.guard.fail(f"protocol {version} is not known")


def op_frame(m: Machine) -> None:
    if _U64(m.take(8))[0] > len(m.data) - m.pos:
        m.guard.truncated("a frame reaches behind the end")


def op_extension(m: Machine) -> None:
    m.guard.fail("extension codes name code outside the file; they are not supported")


def op_buffer(m: Machine) -> None:
    m.guard.fail("it refers to out-of-band buffers, which are not in the file")


def _new(kind: Callable[[], object]) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        m.containers -= 1
        if m.containers < 0:
            m.guard.fail("it builds more containers than its size justifies")
        m.stack.append(kind())

    return op


def _constant(value: object) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(value)


def _push(read: Callable[[Machine], object]) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(read(m))


def _binary_int(width: int) -> Callable[[Machine], object]:
    def read(m: Machine) -> object:
        size = int.from_bytes(m.take(width), "little")
        if size > MAX_INT_BYTES:
            m.guard.fail("an integer is absurdly long")
        return int.from_bytes(m.take(size), "little", signed=True)

    return read


def _byte_array(m: Machine) -> object:
    value = m.byte_string(8)
    return bytearray(value) if type(value) is bytes else value


def _utf8(width: int) -> Callable[[Machine], object]:
    return lambda m: m.counted(width).decode("utf-8", "surrogatepass")


def op_put(m: Machine) -> None:
    _store(m, int(m.line()[:20]))


def op_binput(m: Machine) -> None:
    _store(m, m.take(1)[0])


def op_long_binput(m: Machine) -> None:
    _store(m, _U32(m.take(4))[0])


def _store(m: Machine, index: int) -> None:
    memo = m.memo
    if not memo and index == 1:  # Python 2's cPickle counts from 1
        memo.append(None)
    if index == len(memo):
        memo.append(m.stack[-1])
    elif 0 <= index < len(memo):
        memo[index] = m.stack[-1]
    else:
        m.guard.fail(f"memo entry {index} is stored after only {len(memo)} others")


def op_get(m: Machine) -> None:
    index = int(m.line()[:20])
    if not 0 <= index < len(m.memo):
        m.guard.fail(f"memo entry {index} is read but was never stored")
    m.stack.append(m.memo[index])


def op_tuple(m: Machine) -> None:
    m.stack.append(tuple(m.pop_mark()))


def op_list(m: Machine) -> None:
    m.stack.append(m.pop_mark())


def op_dict(m: Machine) -> None:
    items = m.pop_mark()
    m.stack.append({})
    set_items(m, items)


def op_frozenset(m: Machine) -> None:
    items = m.pop_mark()
    m.guard.check_keys(items, items)
    m.stack.append(frozenset(items))


def op_append(m: Machine) -> None:
    item = m.stack.pop()
    _extend(m, [item])


def op_appends(m: Machine) -> None:
    _extend(m, m.pop_mark())


def _extend(m: Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is Record:
        if target.items is None:
            target.items = items
        else:
            target.items.extend(items)
    else:
        m.guard.fail(f"elements are appended to {brief(target)}")


def op_additems(m: Machine) -> None:
    items, target = m.pop_mark(), m.stack[-1]
    if type(target) is not set:
        m.guard.fail(f"elements are added to {brief(target)}")
    m.guard.check_keys(items, target)
    target.update(items)


def op_setitem(m: Machine) -> None:
    value = m.stack.pop()
    key = m.stack.pop()
    set_items(m, [key, value])


def op_setitems(m: Machine) -> None:
    set_items(m, m.pop_mark())


def set_items(m: Machine, items: list[Any]) -> None:
    """Put keys and values, one after the other, into the dict or Record on top of the stack."""
    target = m.stack[-1]
    if type(target) is Record:
        if target.mapping is None:
            target.mapping = {}
        target = target.mapping
    if type(target) is not dict:
        m.guard.fail(f"items are set on {brief(target)}")
    if len(items) % 2:
        m.guard.fail("a key has no value")
    keys = items[::2]
    for key in keys:
        if type(key) is not str:
            m.guard.check_keys(keys, target)
            break
    target.update(zip(keys, items[1::2], strict=True))


def op_global(m: Machine) -> None:
    module = m.line().decode("utf-8")
    m.stack.append(m.find(module, m.line().decode("utf-8")))


def op_stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        m.guard.fail("a class is named by something that is not a string")
    m.stack.append(m.find(module, name))


def op_reduce(m: Machine) -> None:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)


def op_newobj_ex(m: Machine) -> None:
    kwargs, args = m.stack.pop(), m.stack.pop()
    made = m.call(m.stack[-1], args)
    if kwargs:
        if type(made) is not Record or type(kwargs) is not dict:
            m.guard.fail(f"keyword arguments are passed to {brief(m.stack[-1])}")
        made.kwargs = kwargs
    m.stack[-1] = made


def op_inst(m: Machine) -> None:
    module = m.line().decode("utf-8")
    cls = m.find(module, m.line().decode("utf-8"))
    m.stack.append(m.call(cls, tuple(m.pop_mark())))


def op_obj(m: Machine) -> None:
    cls, *args = m.pop_mark()
    m.stack.append(m.call(cls, tuple(args)))


def is_blank(target: object) -> bool:
    """Whether a dict can become the state of a Record just so."""
    return type(target) is Record and target.state is None and target.name[:6] != "numpy."


def op_build(m: Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if type(target) is Record:
        if target.name == "numpy.ndarray" or target.name == "numpy.dtype":
            made = set_numpy_state(m.guard, target, state)
            if made is not target:
                m.replace_top(target, made)
        elif target.state is None and type(state) is not tuple:
            target.state = state
        else:
            _merge_state(m, target, state)
    elif isinstance(target, np.dtype):
        m.replace_top(target, set_numpy_state(m.guard, target, state))
    elif type(target) is not dict and type(target) is not StoredTensor:
        # Attributes of an OrderedDict (state_dict._metadata) and of a tensor are not needed.
        m.guard.fail(f"attributes are set on {brief(target)}")


def _merge_state(m: Machine, target: Record, state: Any) -> None:
    """Store a (dict, slots) pair as one dict; keep any other state as it is."""
    parts = state if type(state) is tuple else (state,)
    old = target.state
    if not (len(parts) in (1, 2) and all(p is None or type(p) is dict for p in (old, *parts))):
        target.state = state
        return
    merged: dict[Any, Any] = {}
    for part in (old, *parts):
        if part:
            m.guard.spend(len(part))
            merged.update(part)
    target.state = merged


def op_persid(m: Machine) -> None:
    m.stack.append(m.line().decode("utf-8"))
    op_binpersid(m)


def op_binpersid(m: Machine) -> None:
    if m.persistent_load is None:
        m.guard.fail("it refers to objects outside the pickle, where none are expected")
    m.stack[-1] = m.persistent_load(m.stack[-1])


def op_unknown(m: Machine) -> None:
    m.guard.fail(f"unknown opcode {m.data[m.pos - 1]:#04x} at {m.pos - 1}")


def _small_tuple(count: int) -> Callable[[Machine], None]:
    def op(m: Machine) -> None:
        if len(m.stack) < count:
            m.guard.fail("the stack is empty")
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return op


HANDLERS: list[Callable[[Machine], None]] = [op_unknown] * 256
_TABLE: dict[bytes, Callable[[Machine], None]] = {
    b"(": op_mark,
    b"0": op_pop,
    b"1": lambda m: m.pop_mark().clear(),
    b"2": op_dup,
    b"F": _push(text_float),
    b"G": _push(lambda m: _F64(m.take(8))[0]),
    b"I": _push(text_int),
    b"L": _push(text_int),
    b"J": _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    b"M": _push(lambda m: int.from_bytes(m.take(2), "little")),
    b"\x8a": _push(_binary_int(1)),
    b"\x8b": _push(_binary_int(4)),
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b")": _constant(()),
    b"]": _new(list),
    b"}": _new(dict),
    b"\x8f": _new(set),
    b"S": _push(text_string),
    b"U": _push(lambda m: decode_py2(m.counted(1))),
    b"T": _push(lambda m: decode_py2(m.counted(4))),
    b"V": _push(lambda m: str(m.line(), "raw-unicode-escape")),
    b"X": _push(_utf8(4)),
    b"\x8c": _push(_utf8(1)),
    b"\x8d": _push(_utf8(8)),
    b"C": _push(lambda m: m.counted(1)),
    b"B": _push(lambda m: m.byte_string(4)),
    b"\x8e": _push(lambda m: m.byte_string(8)),
    b"\x96": _push(_byte_array),
    b"p": op_put,
    b"q": op_binput,
    b"r": op_long_binput,
    b"\x94": lambda m: m.memo.append(m.stack[-1]),
    b"g": op_get,
    b"h": _push(lambda m: m.memo[m.take(1)[0]]),
    b"j": _push(lambda m: m.memo[_U32(m.take(4))[0]]),
    b"t": op_tuple,
    b"\x85": _small_tuple(1),
    b"\x86": _small_tuple(2),
    b"\x87": _small_tuple(3),
    b"l": op_list,
    b"d": op_dict,
    b"\x91": op_frozenset,
    b"a": op_append,
    b"e": op_appends,
    b"\x90": op_additems,
    b"s": op_setitem,
    b"u": op_setitems,
    b"c": op_global,
    b"\x93": op_stack_global,
    b"R": op_reduce,
    b"\x81": op_reduce,  # NEWOBJ: same stack, same harmless constructors
    b"\x92": op_newobj_ex,
    b"i": op_inst,
    b"o": op_obj,
    b"b": op_build,
    b"P": op_persid,
    b"Q": op_binpersid,
    b"\x80": op_proto,
    b"\x95": op_frame,
    b"\x82": op_extension,
    b"\x83": op_extension,
    b"\x84": op_extension,
    b"\x97": op_buffer,
    b"\x98": op_buffer,
}
for _opcode, _handler in _TABLE.items():
    HANDLERS[_opcode[0]] = _handler
