"""Which sites of a model a rewrite is for, as the user says it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence

from attnopt.errors import OptionError
from attnopt.spec import AttentionSpec

# Module paths or patterns of them, numbers in the report, or a function of path and spec; None means all.
Sites = Sequence[str | int] | Callable[[str, AttentionSpec], bool] | None


def site_key(paths: Sequence[str], given: str | int, rewrite: str) -> str:
    """The key of a site that the user named. Raises `OptionError` with what there is."""
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(paths):
        return paths[given]
    if given in paths:
        return str(given)
    known = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
    raise OptionError(f"{rewrite}: there is no attention site {given!r}; the {len(paths)} sites are {known}.")


def chosen_sites(
    paths: Sequence[str], specs: Mapping[str, AttentionSpec], sites: Sites, rewrite: str
) -> list[str]:  # fmt: skip
    """The keys of the sites that the user means, in graph order; None means all.

    A function is asked about recognised sites only.

    Raises:
        OptionError: for a name, pattern or number that no site has, and for a function that fails.
    """
    if sites is None:
        return list(paths)
    if callable(sites):
        return [key for key, spec in specs.items() if _wanted(sites, key, spec, rewrite)]
    if isinstance(sites, str) or not isinstance(sites, Iterable):
        raise OptionError(f"{rewrite}: sites must be a sequence or a function, not {sites!r}: write [{sites!r}].")
    chosen: set[str] = set()
    for given in sites:
        matches = fnmatch.filter(paths, given) if isinstance(given, str) and given not in paths else []
        chosen.update(matches or [site_key(paths, given, rewrite)])
    return [key for key in paths if key in chosen]


def _wanted(sites: Callable[[str, AttentionSpec], bool], key: str, spec: AttentionSpec, rewrite: str) -> bool:
    try:
        return bool(sites(key, spec))
    except Exception as error:
        raise OptionError(
            f"{rewrite}: the function of sites= failed for {key!r}: {type(error).__name__}: {error}. It is called with "
            "a module path and a spec, and says whether the site is rewritten."
        ) from error
