"""Read a pickle without executing anything: classes become inert records.

Everything that a file names, except a fixed table of plain data types (``pickle_globals``),
becomes a ``Record`` that only stores what the pickle passes to it. So a checkpoint with arbitrary
classes inside loads without those classes, and a hostile one loads too, as data. Format:
CPython's ``pickletools`` (protocols 0 to 5).
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable
from mmap import mmap

from ..errors import FormatError
from .pickle_guard import Guard, TruncatedPickle
from .pickle_machine import Blob, Machine
from .pickle_nesting import check_nesting
from .pickle_ops import HANDLERS, MAX_MARKS, is_blank, set_items
from .records import Global, Record

_GC_PAUSE_BYTES = 100_000
_LONGEST_FIXED = 9  # bytes of the longest opcode with a fixed argument


def loads(
    data: bytes | mmap,
    *,
    where: str,
    persistent_load: Callable[[object], object] | None = None,
    blob: Blob | None = None,
) -> object:
    """Return the object that a pickle describes, as plain data, Records and numpy values.

    Args:
        data: the pickle; bytes after its end are ignored.
        where: file (and entry) for messages.
        persistent_load: turns a persistent id into a value; without it such ids are refused.
        blob: gives what stands for a byte string of 1 KB or more (offset, size), which is not read
            then; arrays want a ``Storage``.

    Raises:
        FormatError: truncated, malformed or hostile data.
    """
    return load_prefix(data, where=where, persistent_load=persistent_load, blob=blob)[0]


def load_prefix(
    data: bytes | mmap,
    *,
    where: str,
    persistent_load: Callable[[object], object] | None = None,
    blob: Blob | None = None,
) -> tuple[object, int]:
    """Like ``loads``, but also return how many bytes the pickle took."""
    machine = Machine(data, Guard(where, len(data)), persistent_load, blob)
    # Building millions of containers would trigger the cycle collector again and again.
    pause = len(data) > _GC_PAUSE_BYTES and gc.isenabled()
    if pause:
        gc.disable()
    try:
        _run(machine)
        root = machine.stack.pop()
        check_nesting(machine.guard, root)
        return root, machine.pos
    except IndexError:
        if machine.pos + _LONGEST_FIXED > len(data):
            problem = f"truncated or lacking a value at its end ({len(data)} bytes)"
            raise TruncatedPickle(f"{where}: malformed pickle: {problem}") from None
        problem = f"a value is missing near {machine.pos}"
        raise FormatError(f"{where}: malformed pickle: {problem}") from None
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as e:
        raise FormatError(f"{where}: malformed pickle near {machine.pos}: {e}") from None
    except (MemoryError, RecursionError) as e:
        raise FormatError(f"{where}: malformed pickle near {machine.pos}: {e}") from None
    finally:
        if pause:
            gc.enable()


def _run(machine: Machine) -> None:
    """Execute up to STOP. The frequent opcodes are inline; literals because names cost time.

    Running out of stack, memo or data raises IndexError, which the caller explains.
    """
    data, stack, memo, marks = machine.data, machine.stack, machine.memo, machine.marks
    push, pop, remember = stack.append, stack.pop, memo.append
    handlers, from_bytes = HANDLERS, int.from_bytes
    pos, end = machine.pos, len(data)
    while (op := data[pos]) != 0x2E:  # STOP
        pos += 1
        if op == 0x94:  # MEMOIZE
            remember(stack[-1])
        elif op == 0x68:  # BINGET
            push(memo[data[pos]])
            pos += 1
        elif op == 0x6A:  # LONG_BINGET
            push(memo[from_bytes(data[pos : pos + 4], "little")])
            pos += 4
        elif op == 0x4B:  # BININT1
            push(data[pos])
            pos += 1
        elif op == 0x29:  # EMPTY_TUPLE
            push(())
        elif op == 0x81 or op == 0x52:  # NEWOBJ, REDUCE
            args, function = pop(), stack[-1]
            if type(function) is Global and function.build is None and type(args) is tuple:
                stack[-1] = Record(function.name, args)
            else:
                stack[-1] = machine.call(function, args)
        elif op == 0x85:  # TUPLE1
            stack[-1] = (stack[-1],)
        elif op == 0x4D:  # BININT2
            push(data[pos] | data[pos + 1] << 8)
            pos += 2
        elif op == 0x28 and len(marks) < MAX_MARKS:  # MARK
            marks.append(len(stack))
        elif op == 0x7D and machine.containers > 0:  # EMPTY_DICT
            machine.containers -= 1
            push({})
        elif op == 0x75:  # SETITEMS
            machine.pos = pos
            set_items(machine, machine.pop_mark())
        elif op == 0x62 and type(stack[-1]) is dict and is_blank(stack[-2]):  # BUILD
            stack[-2].state = stack[-1]
            pop()
        elif op == 0x86:  # TUPLE2
            second = pop()
            stack[-1] = (stack[-1], second)
        elif op == 0x71 and data[pos] == len(memo):  # BINPUT, in sequence
            remember(stack[-1])
            pos += 1
        elif op == 0x8C and (stop := pos + 1 + data[pos]) <= end:  # SHORT_BINUNICODE
            push(str(data[pos + 1 : stop], "utf-8", "surrogatepass"))
            pos = stop
        else:
            machine.pos = pos
            handlers[op](machine)
            pos = machine.pos
    machine.pos = pos + 1
