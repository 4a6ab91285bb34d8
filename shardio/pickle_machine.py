"""The registers of a pickle virtual machine that works on inert values only.

Follows the opcode table of CPython's ``pickletools`` (protocols 0 to 5). Unlike the original it
never imports a name and never calls anything but the constructors of ``pickle_globals``. This
file has the registers; the opcodes are in ``pickle_ops`` and the hot loop in ``unpickle``.
"""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from typing import Any

from .pickle_globals import resolve
from .pickle_guard import Guard, brief
from .records import Global, Record

_MAX_NAME = 1_000
_MAX_LINE = 1 << 20
_LARGE = 1 << 10  # byte strings from this size on may stay in the file

Blob = Callable[[int, int], object]


class Machine:
    """Registers of one unpickling: instruction pointer, stack, marks and memo."""

    def __init__(
        self,
        data: bytes | mmap,
        guard: Guard,
        persistent_load: Callable[[object], object] | None,
        blob: Blob | None = None,
    ) -> None:
        self.data = data
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.guard = guard
        self.persistent_load = persistent_load
        self.blob = blob
        self.containers = 2_000_000 + len(data) // 16  # an empty set costs 216 bytes
        self.globals: dict[tuple[str, str], object] = {}

    # -- raw input

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        start = self.pos
        self.pos = end = start + count
        if end > len(self.data):
            self.guard.truncated(f"{count} bytes wanted at {start}, {len(self.data)} in all")
        return self.data[start:end]

    def line(self) -> bytes:
        """Return the bytes up to the next newline (text opcodes of protocol 0)."""
        end = self.data.find(b"\n", self.pos, self.pos + _MAX_LINE)
        if end < 0:
            self.guard.truncated(f"no end of line after {self.pos}")
        text = self.data[self.pos : end]
        self.pos = end + 1
        return text

    def counted(self, width: int) -> bytes:
        """Return a byte string that is preceded by its little-endian length."""
        return self.take(int.from_bytes(self.take(width), "little"))

    def byte_string(self, width: int) -> object:
        """Return a byte string, or what stands for a large one that is not to be read."""
        size = int.from_bytes(self.take(width), "little")
        if self.blob is None or size < _LARGE:
            return self.take(size)
        start = self.pos
        self.pos = end = start + size
        if end > len(self.data):
            self.guard.truncated(f"{size} bytes wanted at {start}, {len(self.data)} in all")
        return self.blob(start, size)

    def pop_mark(self) -> list[Any]:
        """Remove and return everything above the topmost mark."""
        start = self.marks.pop()
        if start > len(self.stack):
            self.guard.fail("the stack is shorter than its mark")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # -- names and calls

    def find(self, module: str, name: str) -> object:
        """Return what a global stands for here: a dtype, or a Global."""
        key = (module, name)
        if key not in self.globals:
            if len(module) + len(name) > _MAX_NAME:
                self.guard.fail("a class name is absurdly long")
            self.globals[key] = resolve(module, name)
        return self.globals[key]

    def call(self, function: object, args: object) -> object:
        """Build the value of ``function(*args)``; unknown functions give a Record."""
        if type(args) is not tuple:
            self.guard.fail(f"the arguments of a call are {brief(args)}")
        if type(function) is Global:
            build = function.build
            return Record(function.name, args) if build is None else build(self.guard, args)
        if type(function) is Record:
            return Record(f"{function.name[:_MAX_NAME]}()", args)
        return self.guard.fail(f"{brief(function)} is called")

    def replace_top(self, old: object, new: object) -> None:
        """Put ``new`` where ``old`` is: on the stack, and in the memo if it was stored just now."""
        self.stack[-1] = new
        for i in range(len(self.memo) - 1, max(-1, len(self.memo) - 64), -1):
            if self.memo[i] is old:
                self.memo[i] = new
                break
