"""The C++ rows of the printer; the functions they name are in `cpp_prelude`."""

from __future__ import annotations

import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.printer import Dialect, Row

CPP = Dialect(
    rows={
        sp.Add: Row("({0} + {1})", fold=True),
        sp.Mul: Row("({0} * {1})", fold=True),
        ex.FloorDiv: Row("floor_div({0}, {1})"),
        ex.Mod: Row("floor_mod({0}, {1})"),
        ex.Maximum: Row("maximum({0}, {1})"),
        ex.Minimum: Row("minimum({0}, {1})"),
        ex.Trunc: Row("to_int(trunc_({0}))", "f", "i"),
        ex.Snap: Row("((({0} / {1} + 12582912.0f) - 12582912.0f) * {1})", "f", "f"),  # 1.5 * 2**23 leaves no fraction
        sp.floor: Row("to_int(floor_({0}))", "f", "i"),
        sp.Abs: Row("abs_({0})"),
        sp.sign: Row("sign_({0})"),
        sp.exp: Row("exp_({0})", "f", "f"),
        sp.log: Row("log_({0})", "f", "f"),
        sp.tanh: Row("tanh_({0})", "f", "f"),
        sp.sin: Row("sin_({0})", "f", "f"),
        sp.cos: Row("cos_({0})", "f", "f"),
        sp.erf: Row("erf_({0})", "f", "f"),
        sp.Pow: Row("pow_({0}, {1})", "f", "f"),
        sp.And: Row("({0} & {1})", "b", "b", fold=True),
        sp.Or: Row("({0} | {1})", "b", "b", fold=True),
        sp.Not: Row("not_({0})", "b", "b"),
        sp.Ge: Row("to_bool({0} >= {1})", "*", "b"),
        sp.Gt: Row("to_bool({0} > {1})", "*", "b"),
        sp.Le: Row("to_bool({0} <= {1})", "*", "b"),
        sp.Lt: Row("to_bool({0} < {1})", "*", "b"),
        sp.Eq: Row("to_bool({0} == {1})", "*", "b"),
        sp.Ne: Row("to_bool({0} != {1})", "*", "b"),
    },
    casts={
        ("b", "i", False): "int64_t({0})",
        ("b", "l", False): "int64_t({0})",
        ("b", "f", False): "float({0})",
        ("i", "l", False): "{0}",
        ("i", "f", False): "float({0})",
        ("l", "f", False): "float({0})",
        ("b", "i", True): "(-{0})",
        ("b", "l", True): "to_long(-{0})",
        ("b", "f", True): "to_float(-{0})",
        ("i", "l", True): "to_long({0})",
        ("i", "f", True): "to_float({0})",
        ("l", "f", True): "to_float({0})",
    },
    splats={"b": "splat_b({0})", "i": "splat_i({0})", "l": "splat_l({0})", "f": "splat_f({0})"},
    types={
        ("b", False): "bool",
        ("i", False): "int64_t",
        ("l", False): "int64_t",
        ("f", False): "float",
        ("b", True): "VI",
        ("i", True): "VI",
        ("l", True): "VL",
        ("f", True): "VF",
    },
    infinity="INFINITY",
    true="true",
    false="false",
    statement="const {type} {name} = {code};",
    select="select({0}, {1}, {2})",
)
