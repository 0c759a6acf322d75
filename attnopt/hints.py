"""The smallest change that lifts a decline: a row for each kind of reason. A `Decline` with a hint of its own wins."""

from __future__ import annotations

# A phrase of the reason, and what the user can do. The first row that fits counts.
HINTS: tuple[tuple[str, str], ...] = (
    ("after dropout, under the same mask", "return the weights from before dropout, or call model.eval()"),
    ("dropout acts on the scores", "apply dropout to the weights after the softmax, or set it to 0"),
    ("number of heads is not known", "keep the number of heads out of dynamic_shapes, or write it as an int"),
    ("width of the values is not known", "keep the width of the values out of dynamic_shapes, or write it as an int"),
    ("does not sum to one", "use torch.softmax or log_softmax, or fill with -inf"),
    ("head width is not known", "keep the width of a head out of dynamic_shapes, or write it as an int"),
    (
        "scores are compared with one another",
        "choose the keys by position or by a given mask; top-k and thresholds on scores stay eager",
    ),
    ("cannot be expressed", "write the mask or bias with elementwise operators on positions and tensors"),
    ("changed in place", "write the change out of place (masked_fill for masked_fill_) before the attention reads it"),
    ("written in place", "write the change of the attention's output out of place"),
    ("second product of queries", "add one product to the scores and pass the other as a bias tensor"),
    ("a number that the model computes", "use a Python number or a tensor of one element, not .item()"),
    ("computed from the scores", "compute it from the queries and keys, or from a tensor that is there before"),
    ("fused for floating point", "cast queries, keys and values to a floating point dtype before the attention"),
    (
        "is not a tensor by batch, head",
        "reshape it to [batch, heads, positions, width] with view, reshape or transpose",
    ),
    (
        "weights are changed between",
        "move what changes the weights before the softmax, or after the product with the values",
    ),
    ("does not run over the keys", "take the softmax over the dimension that the product with the values sums over"),
    (
        "no contraction of queries and keys",
        "make the scores with matmul, bmm, einsum or scaled_dot_product_attention, and only scale, bias and mask them",
    ),
    ("has a form that is not known", "apply the weights with matmul, bmm or a two-operand einsum"),
    ("both operands of the contraction", "multiply the weights with values that do not come from the same softmax"),
    ("the way from the softmax to the values", "keep only views, casts, dropout and scales between softmax and values"),
    ("no single query dimension", "give the output one dimension for queries and one for the value's width"),
    ("no value in the graph before the attention", "pass the size as a dimension of an input"),
    ("by another norm than the sum", "divide each row by the sum of its own weights"),
    (
        "follows from the sorted",
        "choose the keys by position or by a mask that is there before; as it is, it runs eagerly",
    ),
    ("multi-token attention", "none that keeps its meaning: neighbouring scores mix; it runs as it is"),
    ("talking heads", "none that keeps its meaning: every head needs the scores of all others; it runs as it is"),
    (
        "Gaussian kernel attention",
        "where queries and keys have length 1, use exp(2 q·k), which differs by a factor only",
    ),
    ("additive attention", "a product of queries and keys is what kernels compute; it runs as it is"),
    ("graph attention", "a product of queries and keys is what kernels compute; it runs as it is"),
    ("Sinkhorn attention", "none that keeps its meaning: rows and columns need all scores; it runs as it is"),
    ("log-sum-exp or its maximum", "use the output of flex_attention alone, or call it once more for the log-sum-exp"),
    (
        "runs over more than the keys",
        "give every column of the softmax a value, or write a sink as a learned column that is cut off after it",
    ),
    (
        "enter the weights once more",
        "let the weights be the softmax of the scores alone, or bring a pattern of your own",
    ),
    ("otherwise than as a divisor", "divide the weights of each row by their sum, once"),
    ("rows are normalised more than once", "leave out the second normalisation, or apply it to the output"),
    ("a row is divided by a sum", "divide each row by the sum of its own weights"),
    (
        "also summed over the queries",
        "attention that balances columns, such as Sinkhorn's, is recognised and stays eager",
    ),
    ("under torch.autocast", "put the scores, the softmax and the product with the values under the same autocast"),
    ("fused for dense tensors", "call .to_dense() on the tensor before the attention"),
    ("attention inside", "move the attention out of the operator that wraps it, or capture its body by itself"),
    ("it must give a Region", "mend the pattern that is named: see docs/adding-a-pattern.md"),
    ("gave a region that does not fit", "mend the pattern that is named: see docs/adding-a-pattern.md"),
    ("could not be re", "please report it with the dump that ATTNOPT_DUMP=folder writes; the site runs as before"),
    ("rewritten sites is used up", "raise ATTNOPT_FUEL, or unset it"),
    (
        "while it is traced",
        "make the model take the same way under torch.compiler.is_compiling(), or pass every mask explicitly",
    ),
    ("validation failed", "please report it with the dump that ATTNOPT_DUMP=folder writes; the site runs as before"),
    ("although every site agrees", "please report it with the dump that ATTNOPT_DUMP=folder writes"),
)
FALLBACK = (
    "write it as torch.nn.functional.scaled_dot_product_attention where that fits, "
    "or bring a pattern of your own: Options(patterns=(*attnopt.PATTERNS, mine))"
)


def hint_for(reason: str) -> str:
    """What to change so that the reason no longer holds."""
    return next((hint for phrase, hint in HINTS if phrase in reason), FALLBACK)
