"""The rows of the GPU table, and what each of them has to reach on an H200."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.spec import Heads


@dataclass(frozen=True)
class Target:
    """`figure` of a row has to be at least `least`; `of` names the figure's row for ratios, else empty."""

    figure: str
    least: float
    of: str = ""

    def __str__(self) -> str:
        return f"{self.figure} >= {self.least:g}{' of ' + self.of if self.of else ''}"


@dataclass(frozen=True)
class Row:
    """One line of the table: an attention, its sizes, and the share of scores that its mask keeps.

    `kind`: `forward`, `decode`, `backward`, `linear` or `sparse`. `thorough` rows are also measured against
    FlexAttention's own tuning, as far as the time allows.
    """

    name: str
    spec: str
    heads: Heads
    batch: int
    n_q: int
    n_k: int
    kept: float = 1.0
    kind: str = "forward"
    targets: tuple[Target, ...] = ()
    thorough: bool = False

    @property
    def flex(self) -> bool:
        """Whether FlexAttention can say it: its weights are a softmax."""
        return self.kind != "linear" and self.spec != "sigmoid"

    @property
    def flops(self) -> float:
        """Of the two products, or of the five of a backward, over what is kept."""
        heads, pairs = self.heads, float(self.batch * self.heads.q * self.n_q * self.n_k) * self.kept
        if self.kind == "linear":
            return 4.0 * self.batch * heads.q * self.n_q * heads.d_qk * heads.d_v
        if self.kind == "backward":
            return 2.0 * pairs * (3 * heads.d_qk + 2 * heads.d_v)
        return 2.0 * pairs * (heads.d_qk + heads.d_v)

    @property
    def bytes(self) -> float:
        """Of q, k, v and the result, once each, in 16 bits; in a backward also of their gradients. A dense bias is
        read once, in fp32.
        """
        heads = self.heads
        keys = self.batch * self.n_k * (heads.k * heads.d_qk + heads.v * heads.d_v)
        once = 2.0 * (keys + self.batch * self.n_q * heads.q * (heads.d_qk + heads.d_v))
        bias = 4.0 * heads.q * self.n_q * self.n_k if self.spec == "bias" else 0.0
        return once * (2.0 if self.kind == "backward" else 1.0) + bias

    def floor(self, roof: Mapping[str, float]) -> float:
        """Seconds that the chip's measured rates allow at best."""
        return max(self.flops / roof["flops"], self.bytes / roof["bytes"])


# Queries and keys of a block of a map.
BLOCK = 128


def _dense(width: int) -> Heads:
    return Heads(2048 // width, 2048 // width, 2048 // width, width, width)


_GROUPED = Heads(32, 8, 8, 128, 128)
_CAUSAL, _PLAIN = "causal D=128", "dense D=128"
_FORWARD = {("dense", 64): 390, ("dense", 128): 470, ("causal", 64): 340, ("causal", 128): 400}


def _forward(spec: str, width: int) -> Row:
    least = _FORWARD.get((spec, width))
    targets = () if least is None else (Target("tflops", least), Target("times_flex", 1.0))
    kept = 0.5 if spec == "causal" else 1.0
    return Row(f"{spec} D={width}", spec, _dense(width), 4, 4096, 4096, kept, targets=targets, thorough=width == 128)


def _changed(name: str, spec: str, kept: float, plain: str) -> Row:
    targets = (Target("tflops", 0.9, plain), Target("times_flex", 1.0))
    return Row(name, spec, _dense(128), 4, 4096, 4096, kept, targets=targets)


def _decode(n: int) -> Row:
    least = (Target("bandwidth", 0.8),) if 8 * n * 8 * 256 * 2 >= 64 << 20 else ()
    return Row(f"decode {n // 1024}k", "dense", _GROUPED, 8, 1, n, kind="decode", targets=least)


ROWS = (
    *(_forward(spec, width) for width in (128, 64, 256) for spec in ("dense", "causal")),
    *(_decode(n) for n in (8192, 32768, 131072)),
    *(Row(f"{spec} D={width} backward", spec, _dense(width), 4, 4096, 4096, 0.5 if spec == "causal" else 1.0,
          "backward", (Target("tflops", 300),) if width == 128 else ())
      for width in (128, 64) for spec in ("dense", "causal")),
    Row("window 1024", "window", _dense(128), 1, 16384, 16384, 1024 / 16384, targets=(Target("times_flex", 1.0),)),
    _changed("ALiBi", "alibi", 0.5, _CAUSAL),
    _changed("soft-cap", "softcap", 0.5, _CAUSAL),
    _changed("line of biases (T5)", "line", 1.0, _PLAIN),
    _changed("dense bias", "bias", 1.0, _PLAIN),
    _changed("padding", "padding", 1.0, _PLAIN),
    _changed("documents", "documents", 5 / 32, _CAUSAL),
    _changed("sigmoid", "sigmoid", 0.5, _CAUSAL),
    *(Row(f"linear {n // 1024}k D={width}", "linear", _dense(width), 1, n, n, kind="linear",
          targets=(Target("floor", 1 / 3),))
      for width, lengths in ((128, (2048, 8192, 32768, 65536)), (64, (2048, 65536)), (256, (2048, 65536)))
      for n in lengths),
    *(Row(f"blocks kept {share:.0%} D={width}", "blocks", _dense(width), 1, 16384, 16384, round(share * 128) / 128,
          "sparse", (Target("tflops", 0.85, f"dense D={width}"), Target("times_flex", 1.0)))
      for width in (128, 64, 256) for share in (0.1, 0.25, 0.5)),
)  # fmt: skip


def judge(rows: Sequence[dict[str, Any]], targets: Mapping[str, Sequence[Target]]) -> None:
    """Write into each measured row what it had to reach, and whether it did (`met`; None if there is no figure)."""
    named = {row["name"]: row for row in rows}
    for row in rows:
        row["targets"] = []
        for target in targets.get(row["name"], ()):
            figure = row.get(target.figure)
            if target.of and figure is not None:
                whole = named.get(target.of, {}).get(target.figure)
                figure = None if not whole else figure / whole
            met = None if figure is None else figure >= target.least
            row["targets"].append({"target": str(target), "figure": figure, "met": met})
