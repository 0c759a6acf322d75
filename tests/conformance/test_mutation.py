"""Kernels that are broken on purpose: the check at first use has to object to each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.codegen import cpp
from attnopt.codegen.base import Layout
from attnopt.options import Options
from attnopt.runtime.build import build_kernel
from attnopt.runtime.native import Native, check_rows, layout_of
from attnopt.runtime.validate import Verdict
from tests.conformance.judge import tensors
from tests.specs import Sizes, case

# Name, case, text of the kernel, what it becomes.
MUTATIONS = (
    ("drops the scale", "scale", "* kScale", "* 1.0f"),
    ("causal is off by one", "causal", "splat_i(k0) + kIota", None),
    ("skips the rescale of earlier results", "scale", ".0f : exp_negative(splat_f(running_max - shift))[0]", ".0f : 1.0f"),
    ("forgets the earlier sum", "scale", "running_sum * scale + sum_lanes(sum)", "sum_lanes(sum)"),
    ("reads the wrong key head", "gqa", "& panel", None),
    ("yields zeros for uniform rows", "empty_uniform", "t.mean[d]", "0.0f"),
    ("does not mask the tail", "bias", "if constexpr (kRagged) logit = select(kIota < valid, logit, nothing);", ""),
    ("drops the bias", "bias", "bias_0 + s", "s"),
    ("uses another base of the exponential", "scale", "exp_negative(load(x + j) - shift)", "exp_negative((load(x + j) - shift) * 0.99f)"),
    ("does not divide by the sum", "scale", "1.0f / t.sum[r]", "1.0f"),
    ("forgets the sink", "sink", "t.sum[r] = 1.0f", "t.sum[r] = 0.0f"),
    ("drops the gate", "gate", "value * gate", "value"),
)
