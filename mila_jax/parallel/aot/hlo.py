"""Reads the text of an optimised, scheduled TPU program (HLO) into plain objects. Needs no JAX.

Only what costs are computed from is kept: shapes with their physical layout, operands, attributes, called computations, trip
counts of loops, and the source line of each instruction.
"""

import dataclasses
import functools
import math
import re

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
    "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0,
}  # fmt: skip

_ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_NAME = r"[\w.\-<>]+"
_OPERAND = re.compile(rf"%({_NAME})")
_HEADER = re.compile(rf"(ENTRY )?%?({_NAME})")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result. space: 0 = HBM, others are on-chip memories; padded: bytes it takes there, tiles filled up."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    padded: int

    @property
    def elements(self) -> int:
        """Number of elements, without padding."""
        return math.prod(self.dims)


def _array(dtype: str, dims: str, layout: str | None) -> Array:
    sizes = tuple(int(d.replace("<=", "")) for d in dims.split(",") if d.strip())
    found = re.search(r"S\((\d+)\)", layout or "")
    physical = list(sizes)
    if layout and ":" in layout and sizes:
        order = [int(i) for i in layout.split(":")[0].split(",") if i]  # minor to major
        physical = [sizes[i] for i in reversed(order)]
        tile = re.search(r"T\(([\d,]+)\)", layout)
        sides = [int(t) for t in tile[1].split(",")] if tile else []
        if len(sides) <= len(physical):
            for i, side in enumerate(reversed(sides), 1):
                physical[-i] = -(-physical[-i] // side) * side
    return Array(dtype, sizes, int(found[1]) if found else 0, int(math.prod(physical) * BYTES.get(dtype, 4)))


@functools.lru_cache(maxsize=100_000)
def arrays(type_text: str) -> tuple[Array, ...]:
    """The arrays of a type, tuples flattened: `(f32[8]{0:T(128)}, u32[])` → two."""
    return tuple(_array(*m.groups()) for m in _ARRAY.finditer(type_text))


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`. literal: what stands between a constant's or parameter's brackets."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def out(self) -> tuple[Array, ...]:
        """Arrays of the result."""
        return arrays(self.type)

    def attribute(self, key: str) -> str | None:
        """The value of `key=value` up to the next comma, without the leading %."""
        found = re.search(rf"\b{key}=%?({_NAME})", self.attributes)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """JAX's path of the operation, such as `jit(train_step)/jvp()/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> str | None:
        """The computation of a fusion, call or asynchronous start."""
        return self.attribute("calls") or self.attribute("to_apply")


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: name → instructions in scheduled order; entry: the name of the main one; frames: see `source`."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, str, int, int]]  # id → (file, function, line, id of the caller)

    def source(self, instruction: Instruction, within: str = "mila_jax/") -> str:
        """`file:line function` of the innermost frame in a path that contains `within` ("" if unknown), the path cut to after it."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        at, first = int(found[1]) if found else 0, ""
        while at in self.frames:
            file, function, line, parent = self.frames[at]
            if within in file:
                return f"{file.rpartition(within)[2]}:{line} {function}"
            first, at = first or f"{file.rpartition('/')[2]}:{line} {function}", parent
        return first


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text) - 1


def _instruction(line: str) -> Instruction | None:
    line = line.strip()
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    type_text, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    opcode, inside = rest[:opening], rest[opening + 1 : closing]
    plain = opcode in ("constant", "parameter")
    operands = () if plain else tuple(_OPERAND.findall(inside))
    return Instruction(name.lstrip("%"), opcode, type_text, operands, inside if plain else "", rest[closing + 1 :], root)


def _frames(text: str) -> dict:
    tables = {"FileNames": {}, "FunctionNames": {}, "FileLocations": {}, "StackFrames": {}}
    table = None
    for line in text.splitlines():
        if line in tables:
            table = tables[line]
        found = re.match(r"(\d+) (.*)", line)
        if found and table is not None:
            table[int(found[1])] = found[2]

    def numbers(value):
        return {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", value)}

    frames = {}
    for key, value in tables["StackFrames"].items():
        frame = numbers(value)
        place = numbers(tables["FileLocations"].get(frame.get("file_location_id", 0), ""))
        file = tables["FileNames"].get(place.get("file_name_id", 0), '"?"').strip('"')
        function = tables["FunctionNames"].get(place.get("function_name_id", 0), '"?"').strip('"')
        # The printed id of the caller is one too high: the outermost frame names itself.
        frames[key] = (file, function, place.get("line", 0), frame.get("parent_frame_id", 1) - 1)
    return frames


def parse(text: str) -> Module:
    """Text of a compiled module (`compiled.as_text()` or a dumped `after_optimizations.txt`) → `Module`.

    Raises `ValueError` if there is no entry computation.
    """
    computations, entry, current = {}, None, None
    body = re.search(r"^(ENTRY )?%", text, re.M)
    lines = []
    for line in text[body.start() :].split("\n") if body else ():
        # An instruction may go on over several lines (kernels bring their settings along), some of which begin with a bracket.
        starts = line == "}" or line.startswith(("%", "ENTRY ", "  %", "  ROOT "))
        if starts or not lines:
            lines.append(line)
        elif line:
            lines[-1] += " " + line
    for line in lines:
        if line.startswith(("%", "ENTRY ")) and line.endswith("{") and "->" in line:
            found = _HEADER.match(line)
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif line == "}":
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if entry is None:
        raise ValueError("this text holds no entry computation of a compiled module")
    return Module(computations, entry, _frames(text[: body.start()]))


def _constants(module: Module, name: str | None, depth: int = 0) -> list[int]:
    out = []
    for i in module.computations.get(name, {}).values():
        if i.opcode == "constant" and i.type[:3] in ("s32", "u32") and i.literal.lstrip("-").isdigit():
            out.append(int(i.literal))
        elif i.opcode in ("fusion", "call") and depth < 3:
            out += _constants(module, i.called, depth + 1)
    return out


def _counter_step(condition: Computation, body: Computation) -> int:
    """What a loop adds to its counter each time (loops that the compiler made around a collective often count by 2); 1 if unreadable."""
    root = next((i for i in body.values() if i.root), None)
    for compare in (i for i in condition.values() if i.opcode == "compare"):
        for operand in compare.operands:
            element = condition.get(operand)
            found = re.search(r"index=(\d+)", element.attributes) if element is not None and element.opcode == "get-tuple-element" else None
            if not found or root is None or root.opcode != "tuple" or int(found[1]) >= len(root.operands):
                continue
            value = body.get(root.operands[int(found[1])])
            while value is not None and value.opcode in ("copy", "bitcast"):
                value = body.get(value.operands[0])
            if value is not None and value.opcode == "add":
                steps = [int(body[o].literal) for o in value.operands if o in body and body[o].literal.isdigit()]
                if steps and steps[0] > 0:
                    return steps[0]
    return 1


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often the body of a `while` runs: as the compiler notes it, else from the constant that its condition compares with.

    None when neither is there.
    """
    found = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.attributes)
    if found:
        return int(found[1])
    bounds = [c for c in _constants(module, loop.attribute("condition")) if c > 0]
    if not bounds:
        return None
    step = _counter_step(module.computations.get(loop.attribute("condition"), {}), module.computations.get(loop.attribute("body"), {}))
    return -(-max(bounds) // step)
