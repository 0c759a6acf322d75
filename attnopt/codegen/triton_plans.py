"""Schedules of Triton kernels, and the chips that they have to fit."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.codegen.triton_forward import block_width


@dataclass(frozen=True)
class TritonPlan:
    """Tile of queries by keys, warps, pipeline stages, and how fp32 is multiplied (`ieee` or `tf32x3`).

    `listed`: a list says which tiles of keys are visited, not the positions alone. `maxnreg` is the most registers of a
    thread, on NVIDIA; 0 leaves it to the compiler.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    fp32: str = "ieee"
    listed: bool = False
    maxnreg: int = 0

    def __str__(self) -> str:
        tiles = f"{self.block_m} queries x {self.block_n} keys{' of a list' if self.listed else ''}"
        limit = f", at most {self.maxnreg} registers" if self.maxnreg else ""
        return f"{tiles}, {self.warps} warps, {self.stages} stages{limit}"

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is launched with, and what it compiles ahead of time with."""
        limit = {"maxnreg": self.maxnreg} if self.maxnreg else {}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **limit}


@dataclass(frozen=True)
class Chip:
    """What a plan depends on: `shared`, the most shared memory of a block in bytes, `fp32`, the product to use for it,
    and `processors`, how many blocks run side by side at least.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    fp32: str
    processors: int

    @property
    def binary(self) -> str:
        """The suffix of its machine code."""
        return "cubin" if self.backend == "cuda" else "hsaco"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 166912, "tf32x3", 108),
        Chip("sm_86", "cuda", 86, 32, 101376, "tf32x3", 82),
        Chip("sm_89", "cuda", 89, 32, 101376, "tf32x3", 128),
        Chip("sm_90", "cuda", 90, 32, 232448, "tf32x3", 132),
        Chip("sm_100", "cuda", 100, 32, 232448, "tf32x3", 148),
        Chip("sm_120", "cuda", 120, 32, 101376, "tf32x3", 170),
        Chip("gfx942", "hip", "gfx942", 64, 65536, "ieee", 304),
    )
}

# Chips whose blocks have at most 99 KiB: cards of the Ampere, Ada and Blackwell generations. One set of rows fits all.
_CARDS = ("sm_86", "sm_89", "sm_120")

_Rows = dict[tuple[int, int], tuple[tuple[int, int, int, int], ...]]

_CARD_PLANS: _Rows = {
    (2, 64): ((128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3), (64, 64, 4, 3)),
    (2, 128): ((128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2)),
    (2, 256): ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    (4, 64): ((64, 32, 4, 2), (32, 32, 4, 2)),
    (4, 128): ((32, 16, 4, 2), (32, 32, 4, 1)),
    (4, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
}

# (chip, bytes of an element, greatest head width): plans, the default first. The defaults here and in the tables below
# were compiled for their chips, and for those of data centres all plans were (`benchmarks/aot.py --plans`): they fit,
# and spill at most 256 bytes.
_TABLE: dict[tuple[str, int, int], tuple[tuple[int, int, int, int], ...]] = {
    ("sm_80", 2, 64): ((128, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3), (64, 64, 4, 3)),
    ("sm_80", 2, 128): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)),
    ("sm_80", 2, 256): ((64, 64, 8, 1), (32, 32, 4, 2)),
    ("sm_80", 4, 64): ((64, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_80", 4, 128): ((32, 32, 4, 2), (32, 16, 4, 2)),
    ("sm_80", 4, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
    ("sm_90", 2, 64): ((128, 128, 8, 2), (128, 64, 4, 3), (128, 128, 4, 3), (64, 64, 4, 3)),
    ("sm_90", 2, 128): ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
    ("sm_90", 2, 256): ((128, 64, 8, 2), (64, 32, 4, 3)),
    ("sm_90", 4, 64): ((64, 32, 4, 3), (128, 32, 8, 2), (32, 32, 4, 2)),
    ("sm_90", 4, 128): ((64, 32, 8, 2), (32, 32, 4, 2)),
    ("sm_90", 4, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
    ("sm_100", 2, 64): ((128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3)),
    ("sm_100", 2, 128): ((128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)),
    ("sm_100", 2, 256): ((128, 32, 8, 2), (64, 32, 4, 3)),
    ("sm_100", 4, 64): ((64, 64, 8, 2), (64, 32, 4, 3), (32, 32, 4, 2)),
    ("sm_100", 4, 128): ((64, 32, 8, 2), (32, 32, 4, 2)),
    ("sm_100", 4, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
    ("gfx942", 2, 64): ((128, 64, 4, 2), (128, 32, 4, 2), (64, 64, 4, 1), (256, 64, 8, 1)),
    ("gfx942", 2, 128): ((128, 32, 4, 2), (128, 64, 4, 1), (64, 32, 4, 2)),
    ("gfx942", 2, 256): ((64, 32, 4, 1), (64, 16, 4, 2), (32, 32, 4, 1)),
    ("gfx942", 4, 64): ((64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)),
    ("gfx942", 4, 128): ((64, 32, 4, 1), (32, 16, 4, 2), (32, 32, 4, 1)),
    ("gfx942", 4, 256): ((32, 16, 4, 1), (16, 16, 4, 1)),
    **{(chip, *found): rows for chip in _CARDS for found, rows in _CARD_PLANS.items()},
}
# (bytes of an element, greatest head width): the tile of a decode. Its rows are few; loads in flight are what counts.
_DECODE: _Rows = {
    (2, 64): ((16, 128, 4, 3), (16, 64, 4, 3)),
    (2, 128): ((16, 64, 4, 3), (16, 32, 4, 2)),
    (2, 256): ((16, 32, 4, 2), (16, 16, 4, 2)),
    (4, 64): ((16, 64, 4, 2), (16, 32, 4, 2)),
    (4, 128): ((16, 32, 4, 2), (16, 16, 4, 1)),
    (4, 256): ((16, 16, 8, 1),),
}
# As above, for gradients: four products a tile, and two more sums in registers.
_BACKWARD: _Rows = {
    (2, 64): ((64, 64, 4, 2), (32, 64, 4, 2)),
    (2, 128): ((64, 64, 8, 2), (32, 32, 4, 2)),
    (2, 256): ((32, 32, 4, 1), (16, 32, 4, 1)),
    (4, 64): ((32, 32, 4, 1), (16, 32, 4, 1)),
    (4, 128): ((16, 32, 4, 1), (16, 16, 4, 1)),
    (4, 256): ((16, 16, 8, 1),),
}
# The same for the chips where it differs.
_CARD_DECODE: _Rows = {
    (2, 64): ((16, 64, 4, 3), (16, 128, 4, 2)),
    (2, 128): ((16, 64, 4, 2), (16, 32, 4, 3), (16, 32, 4, 2)),
}
_DECODE_OF: dict[str, _Rows] = {
    **dict.fromkeys(_CARDS, _CARD_DECODE),
    "gfx942": {
        (2, 64): ((16, 64, 4, 3), (16, 128, 4, 2)),
        (2, 128): ((16, 64, 4, 2), (16, 32, 4, 3), (16, 32, 4, 2)),
        (4, 256): ((16, 16, 4, 1),),
    },
}
_CARD_BACKWARD: _Rows = {(2, 128): ((64, 64, 8, 1), (32, 64, 8, 2), (32, 32, 4, 2))}
_BACKWARD_OF: dict[str, _Rows] = {
    **dict.fromkeys(_CARDS, _CARD_BACKWARD),
    "sm_100": {(2, 128): ((64, 64, 8, 1), (32, 64, 8, 2), (32, 32, 4, 2))},
    "gfx942": {(2, 128): ((32, 64, 4, 2), (32, 32, 4, 2)), (4, 256): ((16, 16, 4, 1),)},
}
# (kind, chip, bytes of an element, greatest head width): plans worth measuring beside the others, compiled too.
_EXTRA: dict[tuple[str, str, int, int], tuple[tuple[int, ...], ...]] = {
    ("forward", "sm_90", 2, 64): (
        (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 4), (256, 64, 8, 2),
        (256, 64, 8, 3), (128, 32, 4, 4),
    ),
    ("forward", "sm_90", 2, 128): (
        (128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 4), (64, 64, 4, 2),
        (128, 32, 8, 4), (128, 64, 8, 3, 208),
    ),
    ("forward", "sm_90", 2, 256): ((128, 32, 8, 3), (64, 64, 8, 2), (64, 32, 4, 4)),
    ("decode", "sm_90", 2, 64): ((16, 256, 4, 3), (16, 64, 4, 4), (16, 128, 4, 2), (16, 64, 2, 4), (16, 128, 8, 3)),
    ("decode", "sm_90", 2, 128): ((16, 128, 4, 2), (16, 128, 8, 3), (16, 32, 4, 4), (16, 64, 4, 4), (16, 64, 2, 3)),
    ("decode", "sm_90", 2, 256): ((16, 64, 4, 2), (16, 32, 4, 3), (16, 64, 8, 2)),
    ("backward", "sm_90", 2, 64): ((128, 64, 8, 2), (64, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 3), (128, 128, 8, 1)),
    ("backward", "sm_90", 2, 128): ((64, 32, 4, 2), (128, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 3), (32, 64, 4, 2)),
    ("backward", "sm_90", 2, 256): ((32, 32, 8, 2), (32, 64, 8, 1), (64, 32, 8, 1)),
}  # fmt: skip
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WIDTHS = (64, 128, 256)
# More query rows than this fill a chip by themselves; fewer keys are not worth a second kernel.
_DECODE_ROWS, _DECODE_KEYS = 64, 512


def plans(chip: Chip, dtype: str, d_qk: int, d_v: int) -> tuple[TritonPlan, ...]:
    """Schedules to choose from, the default first; none where no tile of these widths fits."""
    found = _class(dtype, d_qk, d_v)
    if found is None:
        return ()
    size, width = found
    return tuple(TritonPlan(*row, chip.fp32) for row in _TABLE[chip.name, size, width])


def decode_plans(chip: Chip, dtype: str, d_qk: int, d_v: int) -> tuple[TritonPlan, ...]:
    """As `plans`, for few queries and many keys."""
    return _either(chip, _class(dtype, d_qk, d_v), _DECODE, _DECODE_OF)


def backward_plans(chip: Chip, dtype: str, d_qk: int, d_v: int) -> tuple[TritonPlan, ...]:
    """As `plans`, for the gradients."""
    return _either(chip, _class(dtype, d_qk, d_v), _BACKWARD, _BACKWARD_OF)


def _either(
    chip: Chip, found: tuple[int, int] | None, table: _Rows, others: dict[str, _Rows]
) -> tuple[TritonPlan, ...]:
    if found is None:
        return ()
    rows = {**table, **others.get(chip.name, {})}[found]
    return tuple(TritonPlan(*row, chip.fp32) for row in rows)


def _limited(chip: Chip, block_m: int, block_n: int, warps: int, stages: int, maxnreg: int = 0) -> TritonPlan:
    return TritonPlan(block_m, block_n, warps, stages, chip.fp32, maxnreg=maxnreg)


def extra_plans(chip: Chip, dtype: str, d_qk: int, d_v: int, kind: str) -> tuple[TritonPlan, ...]:
    """More plans for tuning: they fit, but nothing says that they are good without a measurement.

    A row is a tile, warps, stages and sometimes the most registers of a thread.
    """
    found = _class(dtype, d_qk, d_v)
    rows = () if found is None else _EXTRA.get((kind, chip.name, *found), ())
    return tuple(_limited(chip, *row) for row in rows)


def _class(dtype: str, d_qk: int, d_v: int) -> tuple[int, int] | None:
    width = max(block_width(d_qk), block_width(d_v))
    found = next((w for w in _WIDTHS if width <= w), None)
    return None if found is None or dtype not in _BYTES else (_BYTES[dtype], found)


def wants_split(chip: Chip, programs: int, rows: int, n_k: int) -> bool:
    """Whether splitting the keys pays: few rows, too few programs for the chip, and keys to share."""
    return rows <= _DECODE_ROWS and programs < 0.8 * chip.processors and n_k >= _DECODE_KEYS


# By kind of kernel.
PLANS = {"forward": plans, "decode": decode_plans, "backward": backward_plans}
