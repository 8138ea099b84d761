"""A package from outside, installed by pip, brings an objective: distillation from a teacher's most
likely tokens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "plugin_package"

DISTIL = """
import sys, torch
from nitp_ops.objectives import ModelInfo, available, build, parse

assert "topk_distillation" in available() and "topk_distillation" not in sys.modules
parse("ntp")
assert "topk_distillation" not in sys.modules  # a plugin is imported when it is named
objective = build("ntp + 0.5*topk_distillation", model=ModelInfo(hidden_size=6, vocab_size=11, num_layers=2))
from topk_distillation import TeacherStreams

draw = dict(dtype=torch.float64, requires_grad=True)
hidden, head = torch.randn(2, 5, 6, **draw), torch.randn(11, 6, **draw)
ids, teacher = torch.randint(11, (2, 5)), torch.randn(2, 5, 11, dtype=torch.float64).softmax(-1)
q, tokens = teacher.topk(3)
tokens[0, 0, 1:] = tokens[1, 2] = -100  # two absent, a row without any
streams = TeacherStreams(token_ids=ids, last_hidden=hidden, head=head, teacher_tokens=tokens, teacher_probabilities=q)
out = objective(streams)

log_p = (hidden @ head.T).log_softmax(-1)
ntp = -log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean()
q = q * (tokens >= 0)
rows = -(q / q.sum(-1, keepdim=True).clamp(min=1e-9) * log_p.gather(-1, tokens.clamp(min=0))).sum(-1)
expected = ntp + 0.5 * rows.sum() / 9
torch.testing.assert_close(out.loss, expected)
for mine, other in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (out.loss, expected))):
    torch.testing.assert_close(mine, other)
assert out.metrics.compute()["topk_distillation/count"] == 9
print("distilled")
"""


def python(*command: str, plugins: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(plugins)}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=plugins,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the package into, from a copy of its sources."""
    folder = tmp_path_factory.mktemp("plugins")
    source = folder / "source"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site"))
    python("-m", "pip", "install", "-q", *options, str(source), plugins=folder)
    return folder / "site"


def test_an_installed_package_distils_beside_ntp(plugins: Path):
    assert python("-c", DISTIL, plugins=plugins).strip() == "distilled"


def test_the_command_lists_and_explains_it(plugins: Path):
    assert "topk_distillation" in python("-m", "nitp_ops", "list", plugins=plugins)
    sizes = ("--hidden", "64", "--vocab", "256", "--layers", "4")
    text = python(
        "-m", "nitp_ops", "explain", "ntp + 0.5*topk_distillation", *sizes, plugins=plugins
    )
    assert "topk_distillation (head term)" in text and "teacher_tokens" in text
