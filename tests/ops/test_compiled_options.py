"""Float options under torch.compile: compiled code never keeps an earlier value (pytorch issue
197889)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend

import nitp_ops

HIDDEN, WEIGHT = (
    torch.linspace(-2, 2, 36).cos().view(6, 6),
    torch.linspace(-3, 3, 66).sin().view(11, 6),
)
LABELS, TARGET = torch.tensor([1, 2, -100, 4, 10, 0]), torch.linspace(-1, 1, 36).sin().view(6, 6)


@pytest.fixture(autouse=True)
def compiles_often():
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


# A float that a tensor takes up too stays an input of the graph: only then could an earlier value
# stay in it.


def token(scale: float, cap: float, smoothing: float, z_loss: float) -> Tensor:
    hidden = HIDDEN * ((2 + scale) * cap * smoothing * z_loss)
    return nitp_ops.linear_cross_entropy(
        hidden,
        WEIGHT,
        LABELS,
        reduction="sum",
        logit_scale=1 / scale,
        softcap=cap,
        label_smoothing=smoothing,
        z_loss=z_loss,
    )


def latent(eps: float) -> Tensor:
    return nitp_ops.alignment(HIDDEN * (1 + eps), TARGET, eps=2 * eps)[0]


@pytest.mark.parametrize(
    ("function", "first", "second"),
    [(token, (1.0, 3.0, 0.1, 0.1), (1.5, 4.0, 0.2, 0.3)), (latent, (5.0,), (6.0,))],
)
def test_compiled_equals_eager_after_a_change_of_any_float_option(
    function: Callable[..., Tensor], first: tuple[float, ...], second: tuple[float, ...]
):
    # the second call makes every float a symbol; from then on one changes at a time
    changes = [
        (*second[:place], 1.7 * second[place], *second[place + 1 :]) for place in range(len(second))
    ]
    values = [function(*options).item() for options in (first, second, *changes)]
    assert len(set(values)) == len(values)
    compiled = torch.compile(function, fullgraph=True)
    assert [compiled(*options).item() for options in (first, second, *changes)] == pytest.approx(
        values, rel=1e-6
    )


def test_a_changing_normalizer_compiles_once_for_all_values():
    def call(count: float) -> Tensor:
        loss = nitp_ops.linear_cross_entropy(HIDDEN * count, WEIGHT, LABELS, normalizer=count)
        return loss + nitp_ops.implicit_token_loss(HIDDEN, TARGET, normalizer=1 / count)

    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counted)
    counts = (1.5, 2.5, 1 / 3, 1 / 7, 4.0, 0.9)
    assert [compiled(c).item() for c in counts] == pytest.approx(
        [call(c).item() for c in counts], rel=1e-6
    )
    assert counted.frame_count == 2


def test_past_dynamos_limit_a_changing_option_runs_eagerly_or_is_an_error():
    def loss(z_loss: float) -> Tensor:
        return nitp_ops.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, z_loss=z_loss)

    options = [0.1 * place for place in range(1, 11)]
    counter = CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(recompile_limit=8):
        compiled = torch.compile(loss, backend=counter)
        assert [compiled(option) for option in options] == [loss(option) for option in options]
        assert counter.frame_count == 8
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        with pytest.raises(FailOnRecompileLimitHit):
            [compiled(option) for option in options]
