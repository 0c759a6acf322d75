"""Multi-head to grouped-query attention on a trained language model: align, merge, heal, and see what it cost."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import attnopt
from attnopt.rewrites import ShareKV, Tolerance, next_token_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.subject import heldout_excerpt, load_subject, loss_of

model = load_subject()
ids = heldout_excerpt()[:, :128]
learned, unseen = ids[:2], ids[2:]
source = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
calibration = [{"input_ids": x, "use_cache": False} for x in (learned, source[:256].view(2, 128))]
example = {"input_ids": unseen, "use_cache": False}


def loss(module: torch.nn.Module) -> float:
    """Held-out loss, nats a byte."""
    return loss_of(lambda x: module(input_ids=x, use_cache=False), unseen)


print(f"original: {loss(model):.3f} nats a byte")
small = attnopt.optimize(
    model, (), example, rewrites=[ShareKV(4, method="aligned", loss=next_token_loss)], tolerance=Tolerance(loss=2.0),
    calibration=calibration, validate=False,
)  # fmt: skip
figures = small.report.figures["share_kv"]
print(
    f"shared: {loss(small):.3f} nats a byte; {figures['parameters before']:,} parameters to "
    f"{figures['parameters after']:,}, {figures['KV numbers a token before']} numbers of KV a token to "
    f"{figures['KV numbers a token after']}"
)
healed = attnopt.heal(small, model, calibration, steps=4, lr=3e-4, progress=False)
print(f"healed for {healed.healing.steps} steps: {loss(healed):.3f} nats a byte")

# To decode, the new weights go back into the model's own class, and its cache holds half of the heads.
grouped = attnopt.standalone(healed, (), example)
sizes = []
with torch.no_grad():
    for module in (model, grouped):
        cache = module(input_ids=unseen, use_cache=True).past_key_values
        sizes.append(sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) // unseen.numel())
print(f"KV cache: {sizes[0]:,} bytes a token to {sizes[1]:,}")
text = grouped.generate(unseen[:1, :64], max_new_tokens=16, do_sample=False, pad_token_id=0)

assert sizes[1] * 2 == sizes[0]
assert text.shape == (1, 80)
assert small.report.rewritten == 6
assert all((s.spec.heads.q, s.spec.heads.k) == (8, 4) for s in small.report.sites)
assert figures["KV numbers a token after"] * 2 == figures["KV numbers a token before"]
assert healed.healing.after < healed.healing.before
assert model.model.layers[0].self_attn.k_proj.weight.shape == (256, 256), "the model itself is never changed"
