"""`standalone`: a model after `ShareKV` or `PruneHeads` as a module of its own class, on the heads that it has now.

An `OptimizedModule` runs one captured forward. The original's own code can do more with the new weights, such as
decoding into a cache of any kind, if it is told the new counts; whether it then computes the same is tried out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.errors import OptionError
from attnopt.graph import ADDED
from attnopt.module import OptimizedModule
from attnopt.spec import Heads

_WEIGHTS_ALONE = ("prune_heads", "share_kv")
# What modules call their counts: the first pattern that an attribute of whole numbers matches says what it holds.
_COUNTS = (
    (re.compile(r"(kv|key_value)_(groups?|repeats?)$|^n_rep$|queries_per_(kv|key_value)"), lambda x: x.q // x.k),
    (re.compile(r"(kv|key_value)_?heads?$|heads?_(kv|key_value)$"), lambda x: x.k),
    (re.compile(r"^(num_|n_|nb_)?(local_)?(attention_|attn_)?heads?$|^nhead$"), lambda x: x.q),
    (re.compile(r"^(inner_dim|all_head_size|split_size)$"), lambda x: x.q * x.d_v),
)
_GROUPS = "num_key_value_groups"


def standalone(fast: OptimizedModule, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """The rewritten model as a module of the original's class: a copy with the new weights and the new head counts.

    Its own code runs, so it decodes with any cache, which holds as many key and value heads as are left, and it can
    be saved as the original can, be given to `optimize` again, or be trained. Where every site has the same counts,
    they stand in its `config` too.

    Args:
        fast: the result of `optimize` with `ShareKV` or `PruneHeads`, and no other approximate rewrite.
        args, kwargs: inputs, on which the copy is compared with `fast`.

    Raises:
        OptionError: for other rewrites, and for code that cannot run on the new counts or computes something else.
    """
    _checked(fast)
    kwargs = dict(kwargs or {})
    modes = {part: part.training for part in fast.modules()}
    fast.eval()
    try:
        with torch.no_grad():
            wanted = fast(*args, **kwargs)
        made = copy.deepcopy(fast._source).eval()
        _tell(made, fast)
        try:
            with torch.no_grad():
                found = made(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception as error:
            raise _unfit(fast, f"it fails with {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
        gap = _gap(found, wanted)
        if not gap <= _limit(wanted):
            raise _unfit(fast, f"it computes something else: its outputs differ by {gap:.2g}, relative")
    finally:
        for part, mode in modes.items():
            part.training = mode
    return made.train(fast.training)


def _checked(fast: Any) -> None:
    if not isinstance(fast, OptimizedModule):
        raise OptionError(f"standalone takes the result of attnopt.optimize, not {type(fast).__name__}.")
    done = {d.rewrite for d in fast._decisions or () if d.sites}
    if not done:
        raise OptionError("standalone: no approximate rewrite changed this model; the original is what you look for.")
    if done - set(_WEIGHTS_ALONE):
        raise OptionError(
            f"standalone: {', '.join(sorted(done - set(_WEIGHTS_ALONE)))} changed more than weights, which the "
            f"original's code cannot run; only {' and '.join(_WEIGHTS_ALONE)} can be taken out of the optimised model."
        )


def _tell(made: nn.Module, fast: OptimizedModule) -> None:
    """Give the modules around each site, their linear maps and the configuration the new counts."""
    made._modules.pop(ADDED, None)
    for part in made.modules():
        weight = getattr(part, "weight", None)
        if isinstance(part, nn.Linear) and isinstance(weight, Tensor) and weight.dim() == 2:
            part.out_features, part.in_features = weight.shape
    sites = [s for s in fast.report.sites if s.spec is not None]
    for site in sites:
        _count(made, site.module_path, site.spec.heads)
    config, alike = getattr(made, "config", None), {(s.spec.heads.q, s.spec.heads.k) for s in sites}
    if config is not None and len(alike) == 1:
        _set(config, sites[0].spec.heads)


def _count(made: nn.Module, path: str, heads: Heads) -> None:
    """The innermost module around a site that counts heads is given these."""
    while True:
        part = made.get_submodule(path)
        if _set(part, heads) or not path:
            # Attention functions of `transformers` repeat keys by this attribute, wherever it is there.
            if heads.k != heads.q and not hasattr(part, _GROUPS):
                setattr(part, _GROUPS, heads.q // heads.k)
            return
        path = path.rpartition(".")[0]


def _set(holder: Any, heads: Heads) -> bool:
    """Set the counts that an object has attributes for; whether there was one."""
    done = False
    for name, held in list(vars(holder).items()):
        if isinstance(held, bool) or not isinstance(held, int):
            continue
        number = next((number for pattern, number in _COUNTS if pattern.search(name)), None)
        if number is not None:
            setattr(holder, name, number(heads))
            done = True
    return done


def _floating(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _gap(found: Any, wanted: Any) -> float:
    """The greatest root mean square of a change of an output, relative to its own; what is NaN in both is equal."""
    pairs = list(zip(_floating(found), _floating(wanted), strict=False))
    gaps = [0.0 if pairs else float("nan")]
    for x, y in pairs:
        if x.shape != y.shape:
            return float("inf")
        same = (x == y) | (x.isnan() & y.isnan())
        gap = (x.double() - y.double()).masked_fill(same, 0.0).square().mean().sqrt()
        gaps.append(float(gap / y.double().masked_fill(~y.isfinite(), 0.0).square().mean().sqrt().clamp_min(1e-30)))
    return max(gaps)


def _limit(wanted: Any) -> float:
    """Half of the digits: far above what another order of summation does, far below other heads."""
    return max((torch.finfo(x.dtype).eps ** 0.5 / 4 for x in _floating(wanted)), default=0.0)


def _unfit(fast: OptimizedModule, what: str) -> OptionError:
    name = type(fast._source).__name__
    return OptionError(
        f"standalone: the code of {name} cannot be told its new head counts: {what}. Its class may have no grouped "
        "heads, or each of its layers the same number; go on with the optimised module."
    )
