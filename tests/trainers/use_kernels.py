"""A Llama whose loss the package `kernels` takes from a folder, through transformers; argument: the
folder.

transformers asks for versions of `kernels` that may be newer than any that is there, and lists
accelerators only: both are lifted here. What runs after that is theirs.
"""

from __future__ import annotations

import copy
import sys
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.import_utils import is_kernels_available

if not is_kernels_available():  # transformers' other modules read it when they are imported, below
    for module in ("transformers.utils", "transformers.utils.import_utils"):
        mock.patch(f"{module}.is_kernels_available", lambda *_: True).start()

from kernels import use_kernel_forward_from_hub
from transformers import KernelConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import kernel_config

from tests.support.trainer_cases import padded, ragged_rows, tiny_llama

kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES.append("cpu")


def results(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def by_formula(
    plain: torch.nn.Module, batch: dict[str, Tensor], count: Tensor | int | None
) -> list[Tensor]:
    """In float64, which transformers' loss rounds to float32."""
    logits = plain(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(
        logits, batch["labels"][:, 1:].flatten(), reduction="mean" if count is None else "sum"
    )
    return results(plain, loss if count is None else loss / count)


plain, batch = tiny_llama(), padded(ragged_rows())
model = copy.deepcopy(plain)
model.loss_layer = use_kernel_forward_from_hub("ForCausalLMLoss")(ForCausalLMLoss)
model.loss_function = model.loss_layer.__call__
mapping = {"ForCausalLMLoss": f"{sys.argv[1]}:ForCausalLMLoss"}
model.train().set_use_kernels(True, KernelConfig(mapping, use_local_kernel=True))
assert "CrossEntropyFunction" in type(model(**batch).loss.grad_fn).__name__
for count in (None, 17, torch.tensor(23)):
    ours = results(model, model(**batch, num_items_in_batch=count).loss)
    for a, b in zip(ours, by_formula(plain, batch, count), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    theirs = plain(**batch, num_items_in_batch=count).loss
    torch.testing.assert_close(ours[0].float(), theirs, rtol=1e-6, atol=0)
assert "nitp_ops" not in sys.modules
print("taken")
