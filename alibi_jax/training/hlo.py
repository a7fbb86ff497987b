"""What a compiled program does, counted in its text: products, bytes moved, bytes communicated.

XLA's own `cost_analysis` counts the body of a loop once. Here it counts as often as it runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
# These move nothing: they name, group or place what is there.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "partition-id",
    "replica-id",
    "after-all",
    "optimization-barrier",
}


@dataclass(frozen=True)
class Cost:
    """What one device does.

    Attributes:
      flops: of matrix products outside kernels.
      hbm_bytes: read from and written to HBM: the operands and results of every instruction, where
        they are not placed in on-chip memory.
      received_bytes: from other devices, by kind of collective, the least that does it: of n
        devices, (n-1)/n of the result of an all-gather and of the operand of a reduce-scatter, and
        twice that for an all-reduce.
      kernels: how often each Pallas kernel runs, with the shapes of its first two operands; what it
        computes is not in the text.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    received_bytes: dict[str, float] = field(default_factory=dict)
    kernels: dict["Kernel", float] = field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.hbm_bytes + other.hbm_bytes,
            _sum(self.received_bytes, other.received_bytes),
            _sum(self.kernels, other.kernels),
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(
            times * self.flops,
            times * self.hbm_bytes,
            {kind: times * n for kind, n in self.received_bytes.items()},
            {kernel: times * n for kernel, n in self.kernels.items()},
        )


class Kernel(NamedTuple):
    """A Pallas kernel by name, with the shapes of its first two operands."""

    name: str
    shapes: tuple[tuple[int, ...], ...]


def _sum(a: dict[Any, float], b: dict[Any, float]) -> dict[Any, float]:
    return {key: a.get(key, 0.0) + b.get(key, 0.0) for key in {**a, **b}}


class Shape(NamedTuple):
    """An array."""

    bits: int  # of an element
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def num_bytes(self) -> float:
        """Without padding."""
        return math.prod(self.dims) * self.bits / 8


@dataclass(frozen=True)
class Instruction:
    """`%name = type opcode(%operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # what the parentheses hold
    attributes: str
    is_root: bool

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """Every array of the result, with the parts of tuples in order."""
        return _shapes(self.type)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute, such as `body`, names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


Computation = dict[str, Instruction]


def count(text: str) -> Cost:
    """The cost of a run of a program.

    Args:
      text: of the optimized module, `jax.stages.Compiled.as_text()`.

    A loop whose number of iterations is not in the text counts as one iteration.
    """
    module = _Module(text)
    return module.cost(module.entry)


class _Module:
    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        self.memo: dict[str, Cost] = {}
        sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
        self.num_devices = math.prod(map(int, sizes))

    def cost(self, name: str) -> Cost:
        """Of everything that a computation does or calls."""
        if name not in self.memo:
            costs = [self.of(i, name) for i in self.computations[name].values()]
            self.memo[name] = sum(costs, Cost())
        return self.memo[name]

    def of(self, i: Instruction, name: str) -> Cost:
        computation = self.computations[name]
        if i.opcode == "while":
            body = self.cost(i.called("body") or "")
            return body * self.trip_count(i, computation) if body != Cost() else body
        if i.opcode == "conditional":
            names = re.findall(r"%([\w.\-]+)", _braces(i.attributes, "branch_computations"))
            names += [n for n in map(i.called, ("true_computation", "false_computation")) if n]
            return max(map(self.cost, names), key=lambda cost: cost.hbm_bytes, default=Cost())
        if i.opcode in ("call", "async-start"):
            called = i.called("to_apply") or i.called("calls")
            return self.cost(called) if called else Cost()
        if i.opcode == "fusion":
            called = i.called("calls") or ""
            inside = self.cost(called)
            moved = self.moved_by_fusion(i, computation, self.computations[called])
            return dataclasses.replace(inside, hbm_bytes=moved)
        return Cost(
            _product_flops(i, computation),
            self.moved(i, computation),
            self.received(i, name),
            _kernels(i, computation),
        )

    # Bytes moved

    def moved(self, i: Instruction, computation: Computation) -> float:
        if i.opcode in _FREE or i.opcode.endswith("-done"):
            return 0.0
        operands = [computation[name] for name in i.operands if name in computation]
        if i.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # An asynchronous copy: its result is (destination, source, ...) in either order, and
            # the smaller of the two is what moves.
            arrays = [s for s in i.shapes if s.dims]
            moved = min((s.num_bytes for s in arrays), default=0.0)
            return moved * sum(s.in_hbm for s in arrays[:2])
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _hbm(i.shapes)
        if i.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(_hbm(operand.shapes) for operand in operands[1:])
        return _hbm(i.shapes) + sum(_hbm(operand.shapes) for operand in operands)

    def moved_by_fusion(self, i: Instruction, outside: Computation, inside: Computation) -> float:
        """Operands and results of a fusion; of one that it slices or updates, that part only."""
        users: dict[str, list[Instruction]] = {}
        for instruction in inside.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)

        def read(name: str, whole: float) -> float:
            parts = 0.0
            for user in users.get(name, []):
                if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                    parts += sum(s.num_bytes for s in user.shapes)
                elif user.opcode == "bitcast":
                    parts += read(user.name, whole)
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    parts += 0.0
                elif _is_collective(user) or user.opcode in ("custom-call", "tuple"):
                    parts += 0.0  # it goes on as it is, or counts with the collective
                else:
                    return whole
            return min(parts, whole)

        def written(name: str) -> float:
            result = inside[name]
            if result.opcode == "tuple":
                return sum(written(operand) for operand in result.operands)
            if result.opcode == "bitcast" and result.operands[0] in inside:
                return written(result.operands[0])
            if result.opcode == "dynamic-update-slice":
                update = inside.get(result.operands[1])
                return sum(s.num_bytes for s in update.shapes) if update else 0.0
            if result.opcode in ("parameter", "custom-call") or _is_collective(result):
                return 0.0
            return sum(s.num_bytes for s in result.shapes)

        total = 0.0
        for instruction in inside.values():
            if instruction.opcode == "parameter":
                index = int(instruction.arguments)
                source = outside.get(i.operands[index]) if index < len(i.operands) else None
                whole = _hbm(source.shapes) if source else 0.0
                total += read(instruction.name, whole) if whole else 0.0
            elif instruction.is_root:
                on_chip = sum(s.num_bytes for s in i.shapes) - _hbm(i.shapes)
                total += max(written(instruction.name) - on_chip, 0.0)
        return total

    # Bytes communicated

    def received(self, i: Instruction, name: str) -> dict[str, float]:
        kind = _is_collective(i)
        if kind is None:
            return {}
        computation = self.computations[name]
        if "async_collective_fusion" in name or _continues(i, computation):
            return {}
        result = sum(s.num_bytes for s in i.shapes)
        if kind == "collective-permute":
            # `-start` gives (operand, result, ...).
            return {kind: i.shapes[0].num_bytes}
        devices = _group_size(i.attributes, self.num_devices)
        share = (devices - 1) / devices
        if kind == "all-gather":
            # `-start` gives operand and result: n+1 parts of which the result has n.
            gathered = result * devices / (devices + 1) if i.opcode.endswith("-start") else result
            return {kind: share * gathered}
        if kind == "reduce-scatter":
            part = result / (devices + 1) if i.opcode.endswith("-start") else result
            return {kind: (devices - 1) * part}
        if kind == "all-to-all":
            return {kind: share * result}
        if name.startswith("all-reduce-scatter"):  # a TPU's reduce-scatter: each keeps a slice
            return {"reduce-scatter": share * result}
        return {kind: 2 * share * result}

    # Loops

    def trip_count(self, loop: Instruction, computation: Computation) -> int:
        """Iterations of a loop; 1 where the text does not say."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        body = self.computations[loop.called("body") or ""]
        root = next(i for i in condition.values() if i.is_root)
        if root.opcode == "fusion":
            outer, root_of = root, self.computations[root.called("calls") or ""]
            root = next(i for i in root_of.values() if i.is_root)
            operands = [
                condition[outer.operands[int(root_of[o].arguments)]]
                if root_of[o].opcode == "parameter"
                else root_of[o]
                for o in root.operands
            ]
        else:
            operands = [condition[name] for name in root.operands if name in condition]
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(operands) != 2:
            return 1
        counter, limit = operands
        if counter.opcode != "get-tuple-element" or _integer(limit) is None:
            return 1
        index = _index(counter)
        start = self.initial(loop, computation, index)
        step = _step(body, index)
        return max(math.ceil(((_integer(limit) or 0) - start) / step), 0)

    def initial(self, loop: Instruction, computation: Computation, index: int) -> int:
        """Where a loop's counter starts: a constant, or else 0, as the loops of JAX do."""
        state = computation.get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return 0
        value = computation.get(state.operands[index])
        while value is not None and value.opcode == "copy":
            value = computation.get(value.operands[0])
        return (_integer(value) or 0) if value is not None else 0


def _step(body: Computation, index: int) -> int:
    """What an iteration adds to the counter; 1 where that cannot be read."""
    root = next(i for i in body.values() if i.is_root)
    update = body.get(root.operands[index]) if root.opcode == "tuple" else None
    while update is not None and update.opcode == "copy":
        update = body.get(update.operands[0])
    if update is None or update.opcode != "add":
        return 1
    values = (_integer(body[name]) for name in update.operands if name in body)
    return next((value for value in values if value), 1)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and " -> " in line:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            if instruction:
                current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    left, _, right = line.strip().partition(" = ")
    match = re.search(r" ([a-z][\w\-]*)\(", right)
    if match is None:
        return None
    # Operands, and numbers of parameters and constants, hold no parentheses.
    arguments, _, attributes = right[match.end() :].partition(")")
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        type=right[: match.start()],
        opcode=match[1],
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=attributes,
        is_root=left.startswith("ROOT "),
    )


def _shapes(text: str) -> list[Shape]:
    """A layout that names a memory space, S(1), is not in HBM, which is S(0) and not named."""
    found = []
    for name, dims, layout in re.findall(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", text):
        digits = re.match(r"[a-z]+?(\d+)", name)
        bits = int(digits[1]) if digits else 8 if name == "pred" else 0
        sizes = tuple(int(size) for size in dims.split(",") if size)
        found.append(Shape(bits, sizes, re.search(r"S\([1-9]", layout) is None))
    return found


def _hbm(shapes: list[Shape]) -> float:
    return sum(shape.num_bytes for shape in shapes if shape.in_hbm)


def _is_collective(i: Instruction) -> str | None:
    kind = i.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _continues(i: Instruction, computation: Computation) -> bool:
    """On a TPU an asynchronous collective stands in every fusion that advances it: count one."""
    return any(
        "AsyncCollectiveDone" in user.attributes
        for user in computation.values()
        if i.name in user.operands
    )


def _group_size(attributes: str, num_devices: int) -> int:
    """Devices that take part in a collective together, of all that run the program."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if named:  # an axis may be split: 'axis_0':(1)4 is the part of size 4
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if counted:
        return int(counted[2])
    listed = re.search(r"replica_groups=\{(\{([\d,]*)\})?", attributes)
    if listed is None:
        raise ValueError(f"a collective whose groups cannot be read: {attributes[:200]}")
    return len(listed[2].split(",")) if listed[1] else num_devices


def _kernels(i: Instruction, computation: Computation) -> dict[Kernel, float]:
    name = re.search(r"/(\w+)/pallas_call", i.attributes)
    if i.opcode != "custom-call" or "tpu_custom_call" not in i.attributes or name is None:
        return {}
    operands = [computation[operand].shapes[0].dims for operand in i.operands[:2]]
    return {Kernel(name[1], tuple(operands)): 1.0}


def _product_flops(i: Instruction, computation: Computation) -> float:
    """Two a multiplication and addition."""
    if i.opcode not in ("dot", "convolution"):
        return 0.0
    lhs, rhs = (computation[name].shapes[0] for name in i.operands[:2])
    (out,) = i.shapes
    if i.opcode == "dot":
        contracted = [int(d) for d in _braces(i.attributes, "lhs_contracting_dims").split(",")]
        return 2.0 * math.prod(out.dims) * math.prod(lhs.dims[d] for d in contracted)
    # A TPU takes batches and contractions as spatial dimensions: count what is not padding.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if labels is None:
        return 0.0
    of_lhs, of_rhs, of_out = labels.groups()
    pairs = 1
    for window in _windows(i.attributes, len(of_out) - 2):
        pairs *= window.pairs(
            lhs.dims[of_lhs.index(str(window.axis))], out.dims[of_out.index(str(window.axis))]
        )
    batch, features = out.dims[of_out.index("b")], out.dims[of_out.index("f")]
    return 2.0 * batch * features * rhs.dims[of_rhs.index("i")] * pairs


class _Window(NamedTuple):
    axis: int
    size: int
    stride: int
    low: int  # padding before the first element
    lhs_dilate: int
    rhs_dilate: int

    def pairs(self, in_size: int, out_size: int) -> int:
        """Elements of the window that fall on elements of the input, for all outputs together."""
        dilated = (in_size - 1) * self.lhs_dilate + 1
        return sum(
            0 <= at < dilated and at % self.lhs_dilate == 0
            for start in range(-self.low, -self.low + out_size * self.stride, self.stride)
            for at in range(start, start + self.size * self.rhs_dilate, self.rhs_dilate)
        )


def _windows(attributes: str, rank: int) -> Iterator[_Window]:
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", text[1])) if text else {}

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * rank

    columns = zip(
        values("size", "1"),
        values("stride", "1"),
        values("pad", "0_0"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        strict=True,
    )
    for axis, (size, stride, pad, lhs, rhs) in enumerate(columns):
        low = int(pad.split("_")[0])
        yield _Window(axis, int(size), int(stride), low, int(lhs), int(rhs))


def _braces(attributes: str, name: str) -> str:
    match = re.search(rf"\b{name}=\{{([^}}]*)\}}", attributes)
    return match[1] if match else ""


def _index(i: Instruction) -> int:
    match = re.search(r"index=(\d+)", i.attributes)
    assert match is not None
    return int(match[1])


def _integer(i: Instruction) -> int | None:
    """The value of a constant."""
    if i.opcode != "constant" or not re.fullmatch(r"-?\d+", i.arguments):
        return None
    return int(i.arguments)
