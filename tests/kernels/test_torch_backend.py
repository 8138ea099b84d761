"""backend="torch": the laws of the compiled kernels hold for row kernels of torch operations, on
any device."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nitp_ops
import tests.ops.cross_entropy.test_linear_cross_entropy as token
import tests.ops.implicit_token.test_implicit_token_loss as latent
from nitp_ops import reference
from nitp_ops.kernels import select
from nitp_ops.objectives import ModelInfo, Streams, build
from tests.core.another_device import AnotherDevice, another_device
from tests.support.budget import near, outputs, widened, within_budget

ROOT = Path(__file__).parents[2]
#: Whole files of laws, run where the compiled library is hidden.
LAWS = (
    "ops/cross_entropy/test_linear_cross_entropy ops/cross_entropy/test_inactive_and_absent_rows "
    "ops/cross_entropy/test_extreme_logits ops/implicit_token/test_rows ops/test_alignment_and_swiglu "
    "ops/implicit_token/test_implicit_token_loss ops/cross_entropy/test_shared_pass ops/test_inactive_rows "
    "ops/test_large_values ops/test_op_laws ops/cross_entropy/test_token_semantics "
    "ops/test_bad_input ops/test_compiled_options objectives/test_values engine/test_blocks "
    "engine/test_plan"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.mark.programs
@pytest.mark.timeout(900)
def test_the_laws_hold_without_the_compiled_library():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.support.without_library",
        "-p",
        "no:cacheprovider",
    ]
    # gradients are compared with the reference in float64 too, in a tenth of the time of gradcheck
    command += ["-k", "not gradcheck", *(f"tests/{name}.py" for name in LAWS.split())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@given(token.problems())
def test_cross_entropy_equals_the_reference(problem):
    inputs, labels, options, upstream, chunk = problem
    ours = token.call(
        nitp_ops.linear_cross_entropy, labels, {**options, "chunk_bytes": chunk, "backend": "torch"}
    )
    exact = outputs(
        token.call(reference.linear_cross_entropy, labels, options), widened(inputs), upstream
    )
    near(outputs(ours, inputs, upstream), exact, ["loss", "d hidden", "d weight", "d bias"])


@given(latent.problems())
def test_implicit_token_loss_equals_the_reference(problem):
    inputs, options, upstream, chunk = problem
    ours = latent.call(
        nitp_ops.implicit_token_loss, {**options, "chunk_bytes": chunk, "backend": "torch"}
    )
    latent.near_the_reference(outputs(ours, inputs, upstream), inputs, options, upstream)


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


@DTYPES
def test_it_keeps_the_budget_of_the_compiled_kernels(dtype):
    inputs = [leaf(130, 64, dtype=dtype), leaf(999, 64, dtype=dtype, scale=0.2)]
    labels = torch.randint(0, 999, (130,))
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}

    def loss(book, **more):
        return lambda h, w: book.linear_cross_entropy(h, w, labels, **options, **more)

    ours = outputs(loss(nitp_ops, backend="torch", chunk_bytes=40 * 999 * 4), inputs)
    within_budget(ours, outputs(loss(reference), inputs), outputs(loss(reference), widened(inputs)))


@DTYPES
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ops_run_where_there_is_no_float64_and_writes_are_dense(dtype, smoothing):
    h, w, gate, up, down = (
        leaf(*shape, dtype=dtype) for shape in ((2, 9, 8), (33, 8), (12, 8), (12, 8), (8, 12))
    )  # fmt: skip
    labels, target = torch.randint(0, 33, (2, 9)), torch.randn(2, 9, 8).to(dtype)
    labels[0, 2:5] = -100
    inputs = h, w, gate, up, down

    def loss(book, **fused):
        token = book.linear_cross_entropy(
            h, w, labels, label_smoothing=smoothing, z_loss=1e-3, **fused
        )
        rows_of = book.alignment(h, target).sum() + book.swiglu(gate, up).float().square().sum()
        return token + book.implicit_token_loss(h, target, gate, up, down) + rows_of

    with another_device(), AnotherDevice():
        ours = loss(nitp_ops, chunk_bytes=200, logits_dtype=torch.float32)
        gradients = torch.autograd.grad(ours, inputs)
    expected = loss(reference)
    near([ours.detach(), *gradients], [expected.detach(), *torch.autograd.grad(expected, inputs)])


SPECS = (
    "ntp + 0.8*nitp",
    "ntp + mtp_shared",
    "ntp + top(window=4)",
    "ntp + nextlat",
    "ntp + fsp_bow(tau=4)",
)


@pytest.mark.parametrize("spec", SPECS)
def test_a_whole_step_runs_where_there_is_no_float64(spec):
    objective = build(spec, model=ModelInfo(hidden_size=16, vocab_size=31, num_layers=4))
    states = {k: leaf(2, 12, 16, dtype=torch.float32) for k in range(5)}
    head, embedding = torch.nn.Linear(16, 31, bias=False), torch.nn.Embedding(31, 16)
    ids = torch.randint(0, 31, (2, 12))

    def step() -> torch.Tensor:
        streams = Streams(
            token_ids=ids, last_hidden=states[4], hidden_states=states, head=head, embed=embedding
        )
        out = objective(streams)
        out.loss.backward()
        return torch.tensor(list(out.metrics.compute().values()))

    expected = step()
    with another_device(), AnotherDevice():
        ours = step()
    torch.testing.assert_close(ours, expected)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return found


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    from nitp_ops.kernels import torch_rows

    columns, n = 4096, 2048
    logits = torch.randn(n, columns).bfloat16()
    stats, prediction = torch.empty(2, n), torch.empty(n, dtype=torch.int64)
    labels = torch.randint(0, columns, (n, 1))
    with _Largest() as seen:
        torch_rows.cross_entropy_rows_(
            logits, labels, None, None, None, None, stats, torch.empty(n, 1), prediction, -100,
            False, 0.1, 1e-3, 20.0, 1.0, True,
        )  # fmt: skip
    assert seen.bytes <= logits.nbytes


def test_devices_without_kernels_are_served_after_one_warning(monkeypatch):
    select._warn_once.cache_clear()
    device = torch.device("mps")
    with pytest.warns(
        RuntimeWarning,
        match=r"mps tensors are served by backend='torch'.*native: no "
        r"compiled.*triton: ",
    ) as warned:
        assert select.select_backend("swiglu", device, None) == "torch"
    assert len(warned) == 1 and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            select.select_backend("swiglu", device, None)
            == "torch"
            == select.select_backend("swiglu", torch.device("cpu"), "torch")
        )
        assert select.select_backend("swiglu", torch.device("cpu"), None) == "native"
    with pytest.raises(
        nitp_ops.BackendError,
        match=r"backend='native' does not serve mps "
        r"tensors.*torch: serves them",
    ):
        select.select_backend("swiglu", device, "native")


@pytest.mark.trainers
def test_an_attached_model_trains_where_there_is_no_float64():
    pytest.importorskip("transformers")
    import tests.support.hugging_face_cases as cases

    model = cases.make("llama", dtype=torch.float32)
    nitp_ops.attach(model, "ntp + 0.8*nitp")
    batch = cases.batch()
    expected = model(**batch).loss.item()
    with another_device():
        with AnotherDevice():
            loss = model(**batch, num_items_in_batch=17).loss
            loss.backward()
        assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)
