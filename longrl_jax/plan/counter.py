"""Counts what a program computes and sends: FLOPs over its jaxpr, bytes over its compiled text.

XLA's cost_analysis() counts the body of a loop once, and says nothing at all for CUDA. Here a body
counts as often as it runs. FLOPs are those of matrix products and convolutions (2 a multiply-add);
everything elementwise is left out. What is sent is read from the compiled program, because most
transfers (gathers of weights, sums of gradients) are XLA's own and stand in no jaxpr.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device."""

    dense: float = 0.0
    """FLOPs of products outside attention's tiles."""
    tiles: float = 0.0
    """FLOPs inside attention's tiles, of those that are executed."""
    decisions: float = 0.0
    """Tiles that are decided on (executed or skipped), one by one."""
    unknown_loops: int = 0
    """Loops whose number of rounds no one can tell; their bodies are counted once."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def times(self, n: float) -> "Work":
        return Work(self.dense * n, self.tiles * n, self.decisions * n, self.unknown_loops)

    @property
    def flops(self) -> float:
        return self.dense + self.tiles

    def _all(self) -> tuple[Any, ...]:
        return self.dense, self.tiles, self.decisions, self.unknown_loops


def work(closed_jaxpr: Any, *, num_devices: int, tile_share: float = 1.0) -> Work:
    """Returns the work of one of num_devices devices.

    Inside shard_map shapes are one device's. Outside they are everyone's, and the work is taken to
    be split evenly. A conditional with a branch that multiplies nothing is a tile of attention:
    tile_share of them run (compiled.tiles_of); any other conditional counts its dearest branch, as
    does one around tiles, a pass that may be empty.
    """
    return _walk(closed_jaxpr.jaxpr, 1 / num_devices, tile_share)


def kernels(closed_jaxpr: Any) -> list[str]:
    """Returns the names of the hand-written kernels in a program (Pallas, cuDNN), sorted."""
    names = set()
    for eqn in _all_equations(closed_jaxpr.jaxpr):
        name = eqn.primitive.name
        if name == "pallas_call":
            said = eqn.params.get("name_and_src_info", eqn.params.get("name", ""))
            names.add(f"Pallas {getattr(said, 'name', said)}")
        elif "dot_product_attention" in name:
            names.add("cuDNN attention")
    return sorted(names)


def _walk(jaxpr: Any, share: float, tile_share: float) -> Work:
    """share: what one device does of a product whose shapes are those of this jaxpr."""
    total = Work()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += Work(dense=_dot_flops(eqn) * share)
        elif name == "conv_general_dilated":
            total += Work(dense=_convolution_flops(eqn) * share)
        elif name == "scan":
            total += _walk(eqn.params["jaxpr"].jaxpr, share, tile_share).times(eqn.params["length"])
        elif name == "while":
            total += _walk(eqn.params["body_jaxpr"].jaxpr, share, tile_share)
            total += Work(unknown_loops=1)
        elif name == "cond":
            total += _branches(eqn, share, tile_share)
        elif name == "shard_map":
            total += _walk(_open(eqn.params["jaxpr"]), 1.0, tile_share)
        elif name == "pallas_call":
            total += _kernel(eqn, share, tile_share)
        else:
            for inner in _inner(eqn):
                total += _walk(inner, share, tile_share)
    return total


def _branches(eqn: Any, share: float, tile_share: float) -> Work:
    works = [_walk(branch.jaxpr, share, tile_share) for branch in eqn.params["branches"]]
    dearest = max(works, key=lambda w: w.flops)
    around_tiles = dearest.tiles > 0
    if dearest.flops and min(w.flops for w in works) == 0 and not around_tiles:
        return Work(0.0, dearest.flops * tile_share, 1.0, dearest.unknown_loops)
    return dearest


def _kernel(eqn: Any, share: float, tile_share: float) -> Work:
    """A Pallas kernel: what its author says it costs, else its body once a program of the grid."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return Work(tiles=estimate.flops * share * tile_share)
    grid = math.prod(int(n) for n in eqn.params["grid_mapping"].grid)
    inner = _walk(_open(eqn.params["jaxpr"]), share, tile_share).times(grid)
    return Work(tiles=inner.dense * tile_share + inner.tiles, unknown_loops=inner.unknown_loops)


def _dot_flops(eqn: Any) -> float:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracting)


def _convolution_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    out_dim = eqn.params["dimension_numbers"].rhs_spec[0]
    taps = math.prod(kernel) / kernel[out_dim]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * taps


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs that an equation runs once: a call's, a checkpoint's, a custom rule's."""
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(_open(x), "eqns"):
                found.append(_open(x))
    return found


def _open(x: Any) -> Any:
    return x.jaxpr if hasattr(x, "jaxpr") and hasattr(x, "consts") else x


def _all_equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from _all_equations(inner)


# What a compiled program sends.

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "f8e4m3fn": 1}
ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_OP = re.compile(rf" = (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation|branch_computations)="
    r"(%[\w.\-]+|\{[^}]*\})"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


def link_bytes(hlo_text: str) -> dict[str, float]:
    """Returns {kind of collective: bytes that one device sends}, of compiled.as_text().

    By the ring algorithms: a gather sends (n-1)/n of its result, a sum twice that of its operand.
    """
    bodies = _computations(hlo_text)
    entry = next(name for name in bodies if name.startswith("ENTRY "))
    return _sent(entry, bodies, {})


def _sent(name: str, bodies: dict[str, list[str]], known: dict[str, Any]) -> dict[str, float]:
    if name in known:
        return known[name]
    total: dict[str, float] = dict.fromkeys(COLLECTIVES, 0.0)
    for line in bodies.get(name, ()):
        if match := _OP.search(line):
            total[match[2]] += _bytes_of(match[1], match[2], bool(match[3]), _group_size(line))
        called = [
            (role, [n.strip() for n in names.strip("{}").split(",")])
            for role, names in _CALLED.findall(line)
        ]
        trips = int(match[1]) if (match := _TRIPS.search(line)) else 1
        branches = []
        for role, names in called:
            for inner in (_sent(n, bodies, known) for n in names):
                if role.endswith(("_computation", "_computations")):
                    branches.append(inner)
                else:
                    times = trips if role in ("body", "condition") else 1
                    total = {k: v + times * inner[k] for k, v in total.items()}
        if branches:  # the dearest one
            dearest = max(branches, key=lambda x: sum(x.values()))
            total = {k: v + dearest[k] for k, v in total.items()}
    known[name] = total
    return total


def _computations(text: str) -> dict[str, list[str]]:
    """{"%name" or "ENTRY %name": its lines}."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?(%[\w.\-]+) \(.*\{$", line):
            current = bodies.setdefault((match[1] or "") + match[2], [])
        else:
            current.append(line)
    return bodies


def _bytes_of(shape: str, kind: str, started: bool, n: int) -> float:
    """shape: of the result, which for a -start holds the operands too."""
    arrays = [(t, dims) for t, dims in _ARRAY.findall(shape) if t in ITEM_BYTES]
    if kind == "collective-permute" and started:
        arrays = [a for a in arrays if a != ("u32", "")]  # contexts
    size = sum(
        ITEM_BYTES[t] * math.prod(int(d) for d in dims.split(",") if d) for t, dims in arrays
    )
    if kind == "collective-permute":
        return size / 2 if started else size
    if kind == "all-reduce":
        return 2 * size * (n - 1) / n
    if kind == "all-to-all":
        return size * (n - 1) / n
    if started:  # operand and result, one of them n times the other
        return size * n / (n + 1) * (n - 1) / n
    whole = size * n if kind == "reduce-scatter" else size
    return whole * (n - 1) / n


def _group_size(line: str) -> int:
    """Devices of one group, in any of the three forms that XLA writes."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[a] for a in re.findall(r"'(\w+)'", match[2]))
    return 1
