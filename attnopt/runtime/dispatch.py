"""Which kernel runs: on the hot path one look-up, on a miss the best backend that works here, with the reason."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen import cpp
from attnopt.codegen.base import Layout, Plan
from attnopt.codegen.cpp_plans import Sizes, choose, listed
from attnopt.errors import AttnoptError, CompileError
from attnopt.options import Options
from attnopt.runtime import lists, triton_launch
from attnopt.runtime.build import build
from attnopt.runtime.capturing import recorded
from attnopt.runtime.compile import vector_lanes
from attnopt.runtime.inputs import check_inputs
from attnopt.runtime.linear_native import tried
from attnopt.runtime.native import Native, check_rows, layout_of
from attnopt.runtime.reference import reference
from attnopt.runtime.sdpa import sdpa_scale
from attnopt.runtime.site import Reference as _Reference
from attnopt.runtime.site import Site as _Site
from attnopt.runtime.triton_select import choice
from attnopt.spec import AttentionSpec

_SHAPES_KEPT = 4096
_COMPILED = ("cpp", "triton")  # generated: they are tried, checked and switched off if they fail


class AttnoptWarning(UserWarning):
    """Something works less well than it could, with what to do about it."""


class Dispatcher:
    """The sites, backends and warnings of one `Options`."""

    def __init__(self, options: Options) -> None:
        self.options, self.lock = options, threading.RLock()
        self.sites: dict[str, _Site] = {}
        self.said: set[str] = set()

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], text: str
    ) -> tuple[Tensor, Tensor]:
        """`(out, lse)` as the operator promises them."""
        site = self.site(text)
        if site.lowered is not None:
            return self._chosen(site, q, k, v, captures, scalars)
        shape = self.shape(site, q, k, v, captures, scalars)
        backend = site.shapes.get(shape)
        if backend is None:
            return self._first(site, shape, q, k, v, captures, scalars)
        try:
            if backend.name not in _COMPILED:
                return self._finish(site, backend(q, k, v, captures, scalars))
            if not backend.by_data or backend.leaves(q, k, captures, scalars, True) is None:
                out, lse = backend(q, k, v, captures, scalars)
                return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse
        except CompileError as error:
            self.warn(f"a kernel failed ({error}); {self._instead(site)} ran instead.")
        return self._finish(site, reference(site.spec, q, k, v, captures, scalars))

    @staticmethod
    def shape(
        site: _Site, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
    ) -> tuple[Any, ...]:
        """What decides which backend runs, by which `site.shapes` are kept."""
        shape = (q.dtype, k.dtype, v.dtype, q.shape, k.shape, v.shape, q.device, k.device, v.device)
        if not captures and not scalars:
            return shape
        about = [
            (t.dtype, t.shape, t.device, a is not None and t.stride(a))
            for t, a in zip(captures, site.axes, strict=False)
        ]
        return (*shape, *about, len(scalars), *scalars[: len(site.spec.scalars)])  # without the seed of a dropout mask

    def _chosen(
        self, site: _Site, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """A selection is made first; what runs is the attention under the mask that it is."""
        assert site.lowered is not None
        shape = self.shape(site, q, k, v, captures, scalars)
        if shape not in site.shapes:
            check_inputs(site.spec, q, k, v, captures, scalars)
            if len(site.shapes) >= _SHAPES_KEPT:
                site.forget()
            site.shapes[shape] = None
        made = choice(site.spec, q, k, captures, scalars, self.options, self.warn)
        result = self.run(q, k, v, [*captures, made], scalars, site.lowered.text)
        run = self.sites[site.lowered.text]
        site.used, site.reason = run.used, run.reason
        return result

    def site(self, text: str) -> _Site:
        """What is known of the spec with this text."""
        found = self.sites.get(text)
        if found is None:
            with self.lock:
                found = self.sites.setdefault(text, _Site(text))
        return found

    def _first(
        self,
        site: _Site,
        shape: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captures: Sequence[Tensor],
        scalars: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """A shape seen for the first time: inputs are checked, a backend chosen, its result compared."""
        check_inputs(site.spec, q, k, v, captures, scalars)
        if 0 in (*q.shape, k.shape[2]):
            return self._finish(site, reference(site.spec, q, k, v, captures, scalars))
        with self.lock:
            found = tried(site, (q, k, v), captures, scalars, self.options, self.warn, self.run)
            if found is not None:
                site.shapes[shape], site.used = found[0], found[0].name
                return self._finish(site, found[1])
            backend = self._backend(site, q, k, captures, scalars)
            result = self._tried(site, backend, (q, k, v), captures, scalars) if backend.name in _COMPILED else None
            if result is None and backend.name in _COMPILED:
                backend = site.fallback()
            if len(site.shapes) >= _SHAPES_KEPT:
                site.forget()
            if not recorded(q):  # what was not compared is compared at the next call
                site.shapes[shape] = backend
            site.used = backend.name
        return self._finish(site, result or backend(q, k, v, captures, scalars))

    def _tried(
        self,
        site: _Site,
        backend: Native,
        inputs: tuple[Tensor, Tensor, Tensor],
        captures: Sequence[Tensor],
        scalars: Sequence[int],
    ) -> tuple[Tensor, Tensor | None] | None:
        """The kernel's result, or None (after a warning) if it may not be used here."""
        q, k, v = inputs
        problem = backend.leaves(q, k, captures, scalars)
        if problem:
            self.warn(f"{problem}; {self._instead(site)} runs at these sizes.")
            return None
        try:
            result = backend(q, k, v, captures, scalars)
        except CompileError as error:
            self.warn(f"a kernel failed ({error}); {self._instead(site)} runs instead.")
            return None
        layout = layout_of(site.axes, q, captures)
        plan = backend.plan if isinstance(backend, Native) else None
        kind = plan or getattr(backend, "variant", lambda q, k: "")(q, k)
        tag = (layout, kind, q.shape[2].bit_length(), k.shape[2].bit_length(), q.shape[2] % 8 == 0, k.shape[2] % 8 == 0)
        if self.options.first_use_check and tag not in site.classes and not recorded(q):
            verdict = check_rows(site.spec, inputs, captures, scalars, *result)
            if not verdict.ok:
                site.reason = f"failed its first-use check: {verdict}"
                site.backends[layout, plan, q.device.type] = site.fallback()
                site.forget()
                self.warn(
                    f"the kernel of {site.spec} disagrees with the reference and is switched off ({verdict}); "
                    f"{self._instead(site)} runs instead. Please report this with the spec's text."
                )
                return None
            site.classes.add(tag)
        return result

    def _backend(self, site: _Site, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]) -> Any:
        layout = layout_of(site.axes, q, captures)
        plan = None
        if q.device.type == "cpu" and not triton_launch.runs_on(q.device, self.options):
            plan = choose(site.spec, Sizes(q.shape[0], q.shape[2], k.shape[2]), vector_lanes())
            if lists.pay(site.spec, lists.sizes_of(site.spec, q, k, scalars)):
                plan = listed(plan)
        key = (layout, plan, q.device.type)
        if key not in site.backends:
            site.backends[key] = self._choose(site, layout, plan, q.device)
        return site.backends[key]

    def _choose(self, site: _Site, layout: Layout, plan: Plan | None, device: torch.device) -> Any:
        kernel = self.options.kernel
        if kernel == "reference" or self.options.disable:
            return _Reference(site.spec)
        own = "triton" if triton_launch.runs_on(device, self.options) else {"cpu": "cpp"}.get(device.type)
        if kernel not in ("auto", own) or own is None or layout.dtype == "float64":
            return site.fallback()
        problem = cpp.supported(site.spec, layout) if own == "cpp" else None
        if problem is None:
            try:
                if own == "triton":
                    chip = triton_launch.chip_of(device)
                    return triton_launch.build(site.spec, layout, chip, self.options, self._noted(site))
                return Native(site.spec, build(site.spec, layout, self.options, self.warn, plan=plan), plan)
            except AttnoptError as error:
                problem = str(error)
        site.reason = problem
        if not site.spec.dropout:  # no kernel has dropout, and nothing can be installed against that
            self.warn(f"no compiled kernel: {problem.rstrip('.')}. {self._instead(site).capitalize()} runs instead.")
        return site.fallback()

    def _noted(self, site: _Site) -> Callable[[str], None]:
        """A warning that is also why the site does not run as it was asked to."""

        def warn(message: str) -> None:
            site.reason = message
            self.warn(message)

        return warn

    @staticmethod
    def _instead(site: _Site) -> str:
        return "the reference" if sdpa_scale(site.spec) is None else "scaled_dot_product_attention"

    def _finish(self, site: _Site, result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """The result in the layout and dtypes that the operator's fake kernel promises."""
        out, lse = result
        batch, heads, rows, width = out.shape
        row = max(width, 1)
        token = row * max(heads, 1)
        if out.stride() != (token * max(rows, 1), row, token, 1):
            out = out.new_empty((batch, rows, heads, width)).transpose(1, 2).copy_(out)
        if not site.wants_lse or lse is None:
            return out, torch.empty(0, dtype=torch.float32, device=out.device)
        return out, lse.to(torch.float32).contiguous()

    def warn(self, message: str) -> None:
        """Say it, once."""
        if message not in self.said:
            self.said.add(message)
            warnings.warn(message, AttnoptWarning, stacklevel=2)


@functools.lru_cache(maxsize=64)
def dispatcher(options: Options) -> Dispatcher:
    """The dispatcher of these options; one for equal options."""
    return Dispatcher(options)


_active: ContextVar[Dispatcher | None] = ContextVar("attnopt_dispatcher", default=None)
_default: list[Dispatcher] = []


def current() -> Dispatcher:
    """The dispatcher in effect: of the innermost `use`, else of the options from the environment."""
    active = _active.get()
    if active is None and not _default:
        _default.append(dispatcher(Options.make()))
    return active or _default[0]


@contextlib.contextmanager
def use(options: Options) -> Iterator[Dispatcher]:
    """Run everything inside with these options."""
    token = _active.set(dispatcher(options))
    try:
        yield _active.get()  # type: ignore[misc]
    finally:
        _active.reset(token)


def forward(
    q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], scalars: list[int], spec: str
) -> tuple[Tensor, Tensor]:
    """The operator's kernel."""
    return current().run(q, k, v, captures, scalars, spec)


def kernel_used(spec_key: str) -> str | None:
    """The backend that ran the spec last: `cpp`, `sdpa` or `reference`; None if it has not run."""
    return site.used if (site := _site_of(spec_key)) else None


def kernels(spec: AttentionSpec) -> str:
    """The backends that ran a spec, or the terms of a sum, last; empty if none has run."""
    return ", ".join(dict.fromkeys(name for term in spec.terms if (name := kernel_used(term.key))))


def why_not(spec_key: str) -> str:
    """Why the spec does not run on a compiled kernel; empty if it does or has not run."""
    return site.reason if (site := _site_of(spec_key)) else ""


def _site_of(spec_key: str) -> _Site | None:
    """The site of a spec; else of the same spec that also returns lse, as it runs where gradients are wanted."""
    sites = sorted(current().sites.values(), key=lambda s: s.spec.key != spec_key)
    return next((s for s in sites if spec_key in (s.spec.key, replace(s.spec, returns=()).key)), None)
