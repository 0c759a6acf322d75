"""What is still computed once sites are fused, and for whom: inner values such as returned weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx

from attnopt.graph import is_pure, module_path, op_name, source_line
from attnopt.patterns.views import CASTS, VIEWS
from attnopt.region import Line, Region


def live(graph: fx.Graph, regions: Sequence[Region]) -> set[fx.Node]:
    """The nodes that are computed when each region's output is made from its operands at once."""
    leaves = {region.output: list(operands(region)) for region in regions}
    queue = [n for n in graph.nodes if n.op == "output" or (n.op == "call_function" and not is_pure(n))]
    seen = set(queue)
    while queue:
        node = queue.pop()
        for x in leaves.get(node, node.all_input_nodes):
            if x not in seen:
                seen.add(x)
                queue.append(x)
    return seen


def operands(region: Region) -> Iterator[fx.Node]:
    """Every node that the fused attention reads."""
    for term in region.terms:
        for operand in (term.query, term.key, term.value, *term.captures.values()):
            yield operand.node.table if isinstance(operand.node, Line) else operand.node


def used_elsewhere(graph: fx.Graph, regions: Sequence[Region]) -> dict[fx.Node, str]:
    """For each site with inner values that something outside uses: which values, and by whom. Keyed by anchor."""
    computed = live(graph, regions)
    found: dict[fx.Node, str] = {}
    for region in regions:
        inner = frozenset().union({region.output}, *(term.inner for term in region.terms))
        sentences = []
        for node in sorted((inner & computed) - {region.output}):
            others = [u for u in node.users if u in computed and u not in inner]
            if others:
                sentences.append(f"%{node.name} is also used by {', '.join(dict.fromkeys(map(_who, others)))}")
        if sentences:
            what = "it is" if len(sentences) == 1 else "they are"
            found[region.anchor] = f"{'; '.join(sentences)}, so {what} still computed beside the fused attention."
    return found


def _who(user: fx.Node) -> str:
    """Module and line of the first real use: through views and casts."""
    while (op_name(user) in VIEWS or op_name(user) in CASTS) and len(user.users) == 1:
        user = next(iter(user.users))
    if user.op == "output":
        return "the model's output"
    place, line = module_path(user), source_line(user)
    text = f"%{user.name} in {place}" if place else f"%{user.name}"
    return f"{text} ({line})" if line else text


def bystanders(graph: fx.Graph, names: Iterable[str], taken: set[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """Normalisers (operators of these names) that no site has taken, with where each result goes."""
    known = frozenset(names)
    for node in graph.nodes:
        if op_name(node) in known and node not in taken:
            users = list(dict.fromkeys(op_name(u).removeprefix("aten::") or u.op for u in node.users))
            goes = f"its result goes to {', '.join(users[:4])}" if users else "its result is not used"
            yield node, f"{op_name(node).removeprefix('aten::')} in no attention: {goes}"
