"""What the trained model's last hidden states say about the next eight tokens:
`nitp_ops.geometry`'s two probes."""

from __future__ import annotations

import torch

from experiments.train.run import Run
from nitp_ops import geometry

OFFSETS = tuple(range(1, 9))
# Rows that the probes read: 12 thousand to fit and 4 thousand to test leave 0.8 points of sampling
# error at most.
ROWS = 16_384
LINEAR, NEAREST, MAJORITY = "linear_probe", "knn_probe", "probe_baseline"


@torch.no_grad()
def probe(run: Run) -> dict[str, float]:
    """``{"linear_probe/1": accuracy, "knn_probe/1": ..., "probe_baseline/1": ..., "linear_probe/2":
    ...}``.

    On windows of the text held out from training, evenly spaced. The last quarter of them tests the
    probes, so that at most one document lies on both sides.
    """
    text = run.corpus.held_out
    count = min(len(text), max(8, ROWS // run.options.context))
    ids, documents = text.take(torch.linspace(0, len(text) - 1, count).long())
    batches = zip(ids.split(run.options.batch), documents.split(run.options.batch), strict=True)
    with run.autocast():
        hidden = torch.cat([run.forward(run.tokens(*batch)).last_hidden for batch in batches])
    tested = torch.arange(count) >= count - max(1, count // 4)
    token_ids, document_ids = ids.to(run.device), documents.to(run.device)
    found = {}
    for offset in OFFSETS:
        for name, measure in ((LINEAR, geometry.linear_probe), (NEAREST, geometry.knn_probe)):
            result = measure(hidden, token_ids, offset, document_ids=document_ids, held_out=tested)
            found |= {f"{name}/{offset}": result.accuracy, f"{MAJORITY}/{offset}": result.baseline}
    return found
