"""The adapters ask for the packages they were tested with, by name, and nothing else imports them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from nitp_ops.attaching.optimizers import check_optimizers
from nitp_ops.objectives import Need
from nitp_ops.trainers.requirements import check_streams, check_version

ADAPTERS = {
    "lightning": ("lightning", "2.4", "3.0"),
    "torchtitan": ("torchtitan", "0.3", "0.4"),
    "megatron": ("megatron-core", "0.16", "0.17"),
    "axolotl": ("axolotl", "0.19", "0.20"),
}


def test_importing_nitp_ops_imports_no_trainer():
    code = "import sys, nitp_ops.objectives, nitp_ops.attaching; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "nitp_ops.attaching.api" in loaded
    trainers = {
        "lightning",
        "torchtitan",
        "megatron",
        "axolotl",
        "transformers",
        "accelerate",
        "trl",
        "peft",
        "pydantic",
    }
    assert not trainers & set(loaded)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("found", ["0.1.7", "99.0", None])
def test_an_adapter_refuses_a_package_that_it_was_not_tested_with(adapter, found, monkeypatch):
    package, lowest, below = ADAPTERS[adapter]

    def version(name: str) -> str:
        assert name == package
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.delitem(sys.modules, f"nitp_ops.trainers.{adapter}", raising=False)
    got = "is not installed" if found is None else f"is {found}"
    with pytest.raises(
        ImportError, match=f"^{package} {got}, expected {package}>={lowest},<{below}$"
    ):
        importlib.import_module(f"nitp_ops.trainers.{adapter}")


@pytest.mark.parametrize(
    ("found", "good"), [("2.4", True), ("2.10.1", True), ("2.3.9", False), ("3.0.0rc1", False)]
)
def test_versions_compare_as_numbers(found, good, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    if good:
        check_version("thing", "2.4", "3.0")
    else:
        with pytest.raises(ImportError, match=f"thing is {found}, expected thing>=2.4,<3.0"):
            check_version("thing", "2.4", "3.0")


def test_a_stream_that_is_not_provided_is_named_with_what_is():
    provided = ("token_ids", "hidden_states", "external[aux_loss]")
    needs = {Need("token_ids"), Need("hidden_states", layer=3), Need("external", name="aux_loss")}
    check_streams("loop", needs, provided)
    expected = r"loop: the objective requires embed, external\[other\], expected only what .*: token_ids, hidden_states"
    with pytest.raises(ValueError, match=expected):
        check_streams(
            "loop", {Need("token_ids"), Need("external", name="other"), Need("embed")}, provided
        )


def test_a_parameter_that_no_optimizer_holds_is_named():
    objective = torch.nn.Linear(2, 2)
    held = [torch.optim.SGD([parameter], lr=0.1) for parameter in objective.parameters()]
    check_optimizers("loop", objective, objective, held)
    with pytest.raises(
        ValueError,
        match=r"^loop: bias of the objective in no group of the "
        r"optimizer, expected all",
    ):
        check_optimizers("loop", objective, objective, held[:1])
