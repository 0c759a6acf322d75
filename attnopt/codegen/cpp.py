"""C++ kernels: one tiled online-softmax forward, generated for a spec, a layout and a plan.

C ABI, strides in elements (any value, zero and negative included):

    int32_t attnopt_forward(const void* const* tensors, void* out, float* lse, const int64_t* meta, int32_t threads)

`tensors` are q, k, v and the captures. `meta` is `B, n_q, n_k`, the four strides of each of q, k, v and out, the
strides of each capture in order, and the scalars. Where the plan has lists (`cpp_lists`), the list is one more tensor;
its first three strides and the number of its most blocks stand behind the scalars. `lse` is contiguous `[B, H, n_q]`
fp32 or null; several side outputs of a row stand next to one another. The result is 0, 1 without memory, 2 for an
argument that cannot be.
"""

from __future__ import annotations

from attnopt import expr as ex
from attnopt.codegen.base import ABI, Kernel, Layout, Plan
from attnopt.codegen.cpp_driver import DRIVER, PACKING
from attnopt.codegen.cpp_gather import row_fields
from attnopt.codegen.cpp_holes import capture_types, fill
from attnopt.codegen.cpp_lists import list_constants, list_fields, list_reads
from attnopt.codegen.cpp_loads import C_TYPES, k_axes
from attnopt.codegen.cpp_prelude import prelude
from attnopt.codegen.cpp_rows import ENDS, ROW_ENDS
from attnopt.codegen.cpp_skeleton import COMMON, SCORE_BLOCK, TILE, VALUE_BLOCK
from attnopt.codegen.cpp_stream import STREAM, STREAM_BLOCKS, STREAM_DRIVER
from attnopt.codegen.cpp_text import ELEMENTS, fill_holes, head_map, header, tidy
from attnopt.codegen.cpp_whole import WHOLE, WHOLE_BLOCKS
from attnopt.errors import SpecError
from attnopt.returns import PAIRS
from attnopt.spec import AttentionSpec, EmptyRow, Mixed, Softmax

__all__ = ["FLAGS", "emit", "k_axes", "supported"]

# NaN and infinities keep their meaning: no -ffast-math.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-psabi",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
_FORMS = {
    "tile": COMMON + SCORE_BLOCK + VALUE_BLOCK + PACKING + ENDS + TILE + DRIVER + "@GATHER@",
    "whole": COMMON + SCORE_BLOCK + WHOLE_BLOCKS + PACKING + ROW_ENDS + WHOLE + DRIVER + "@GATHER@",
    "stream": COMMON + ENDS + STREAM_BLOCKS + STREAM + STREAM_DRIVER + "@GATHER@",
}
# Names that C++ or the argument struct keeps for itself.
_WORDS = """
q k v out lse list places counts n_b n_q n_k
alignas alignof asm auto break case catch char class concept const constexpr continue
bool decltype default delete do double else enum explicit export extern false float for friend goto if inline int long
mutable namespace new operator private protected public register requires return short signed sizeof static struct
switch template this throw true try typedef typeid typename union unsigned using virtual void volatile while and or
not xor linux unix INFINITY NAN
"""
_RESERVED = frozenset(_WORDS.split())


def supported(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why there is no C++ kernel for this spec and layout; None if there is one."""
    if spec.dropout or layout.page:
        return f"the C++ kernel has no {'dropout' if spec.dropout else 'pages: it reads an entry from one tensor'}"
    if spec.select is not None or spec.merge or isinstance(spec.normalizer, Mixed) or set(spec.returns) & set(PAIRS):
        return "the C++ kernel visits all keys that `keep` allows, with one normaliser, and returns one result"
    if isinstance(spec.normalizer, Softmax) and spec.weight != 1 and spec.empty_row is EmptyRow.UNIFORM:
        return "the C++ kernel has no uniform empty rows whose weights are multiplied"
    if isinstance(spec.normalizer, Softmax) and spec.normalizer.sink is not None and spec.normalizer.sink.has(ex.q):
        return "the C++ kernel has one sink a head, none a query"
    if layout.dtype not in ELEMENTS:
        return f"the C++ kernel has no {layout.dtype}; it has {', '.join(ELEMENTS)}"
    if len(layout.captures) != len(spec.captures):
        return f"the layout describes {len(layout.captures)} captures; the spec has {len(spec.captures)}"
    for capture, about in zip(spec.captures, layout.captures, strict=True):
        if about.dtype not in C_TYPES:
            return f"the C++ kernel cannot load {capture.name} of dtype {about.dtype}"
    for name in (*(c.name for c in spec.captures), *spec.scalars):
        if name in _RESERVED or name.endswith("_stride") or not name.isascii():
            return f"the C++ kernel cannot use {name!r} as the name of a capture or scalar"
    try:
        fill(spec, layout, Plan())
    except SpecError as error:
        return str(error)
    return None


def emit(spec: AttentionSpec, layout: Layout, plan: Plan | None = None, source_note: str = "") -> Kernel:
    """The kernel of a spec. Raises `SpecError` where `supported` gives a reason.

    Args:
        spec: what to compute.
        layout: dtypes and unit strides to specialise for.
        plan: schedule; by default one chosen for the widths.
        source_note: where the site stands in the user's code, for the header.
    """
    reason = supported(spec, layout)
    if reason is not None:
        raise SpecError(f"{reason}.")
    plan = plan or Plan()
    spec = spec.canonical()
    holes = fill(spec, layout, plan)
    half = "float16" in (layout.dtype, *(c.dtype for c in layout.captures))
    body = "\n".join(
        [
            header("forward", spec, layout, plan, source_note),
            prelude(plan.lanes, half),
            _constants(spec, layout, plan, holes),
            _args(spec, layout, plan),
            fill_holes(_FORMS[plan.form], holes),
            _entry(spec, layout, plan),
        ]
    )
    return Kernel("cpp", tidy(body), spec.key, layout, plan)


def _constants(spec: AttentionSpec, layout: Layout, plan: Plan, holes: dict[str, str]) -> str:
    heads = spec.heads
    panel = 2 * plan.lanes
    width = -(-heads.d_v // plan.lanes) * plan.lanes
    block_q = -(-plan.block_q // plan.rows) * plan.rows
    block_k = -(-plan.block_k // panel) * panel
    stream, listed = plan.form == "stream", "".join(f"\n{line}" for line in list_constants(plan))
    tile = {"stream": "kBlockQ", "whole": "kRows"}.get(plan.form, "kMostQ")
    depth = -(-heads.d_qk // plan.lanes) * plan.lanes if stream else heads.d_qk
    shared = "true" if heads.k == heads.v and heads.k_map == heads.v_map else "false"
    return f"""\
// ---- this attention -------------------------------------------------------------------------------
typedef {ELEMENTS[layout.dtype]} Element;  // of q, k, v and out
constexpr int kHeads = {heads.q}, kKeyHeads = {heads.k}, kValueHeads = {heads.v}, kD = {heads.d_qk}, kDv = {heads.d_v};
constexpr int kRows = {plan.rows}, kPanel = {panel}, kBlockQ = {block_q}, kBlockK = {block_k};
constexpr int kMostQ = kBlockQ + kRows;  // a few rows more than a block are still one tile
constexpr int kTileQ = {tile};  // rows in the scratch memory{listed}
constexpr int kDepth = {depth};  // row of a query in the scratch memory
constexpr int kStats = (kTileQ + kLanes - 1) / kLanes * kLanes;  // rows in whole vectors
constexpr int kWidth = {width};  // kDv in whole vectors
constexpr float kScale = {holes["SCALE"]};  // constant factor of the scores, folded into q
constexpr bool kStaticMask = {holes["STATIC_MASK"]};  // some of the mask is decided by coordinates
constexpr bool kChanges = {holes["CHANGES"]};  // logits differ from scaled scores
constexpr bool kSharedHeads = {shared};  // keys and values have one head map
struct Whole {{ static constexpr bool value = false; }};
struct Ragged {{ static constexpr bool value = true; }};
{head_map("key_head", heads.k_map, heads.q, heads.k)}
{head_map("value_head", heads.v_map, heads.q, heads.v)}"""


def _args(spec: AttentionSpec, layout: Layout, plan: Plan) -> str:
    captures = capture_types(spec, layout)
    fields = [f"  const {c_type}* {name};\n  int64_t {name}_stride[{max(rank, 1)}];" for name, c_type, rank in captures]
    fields += [*(f"  int64_t {name};" for name in spec.scalars), *list_fields(plan), *row_fields(spec)]
    return "\n".join(
        [
            "",
            "struct Args {",
            "  int64_t n_b, n_q, n_k;",
            "  const Element *q, *k, *v;",
            "  Element* out;",
            "  float* lse;",
            "  int64_t q_stride[4], k_stride[4], v_stride[4], out_stride[4];",
            *fields,
            "};",
        ]
    )


def _entry(spec: AttentionSpec, layout: Layout, plan: Plan) -> str:
    captures = capture_types(spec, layout)
    reads = []
    for position, (name, c_type, rank) in enumerate(captures):
        reads.append(f"  a.{name} = static_cast<const {c_type}*>(tensors[{3 + position}]);")
        reads.append(f"  for (int i = 0; i < {rank}; ++i) a.{name}_stride[i] = *meta++;")
    reads += [f"  a.{name} = *meta++;" for name in spec.scalars]
    reads += list_reads(plan, 3 + len(captures))
    return f"""
extern "C" int32_t attnopt_abi() {{ return {ABI}; }}

extern "C" const char* attnopt_key() {{ return "{spec.key}"; }}

extern "C" int32_t attnopt_forward(const void* const* tensors, void* out, float* lse, const int64_t* meta,
                                   int32_t threads) {{
  if (!tensors || !meta || threads < 1) return 2;
  Args a{{}};
  a.n_b = *meta++, a.n_q = *meta++, a.n_k = *meta++;
  if (a.n_b < 0 || a.n_q < 0 || a.n_k < 0 || a.n_k > INT32_MAX / 2 || a.n_q > INT32_MAX / 2) return 2;
  int64_t* const strides[4] = {{a.q_stride, a.k_stride, a.v_stride, a.out_stride}};
  for (int i = 0; i < 16; ++i) strides[i / 4][i % 4] = *meta++;
  a.q = static_cast<const Element*>(tensors[0]);
  a.k = static_cast<const Element*>(tensors[1]);
  a.v = static_cast<const Element*>(tensors[2]);
  a.out = static_cast<Element*>(out);
  a.lse = lse;
{chr(10).join(reads)}
  if (a.n_b == 0 || a.n_q == 0) return 0;
  if (!a.out || !a.q || (a.n_k > 0 && (!a.k || !a.v))) return 2;
  return run(a, threads);
}}"""
