"""What the pretraining example compares: the control table at any depth, several seeds, every bad
objective named."""

from __future__ import annotations

import pytest

from examples import pretrain
from experiments.analysis import arms
from experiments.train import options
from nitp_ops.objectives import NITP, ModelInfo, parse
from tests.experiments.pretrain_cases import (
    arguments,
    checkpoint,
    complaint,
    steps_without_times,
)


def info(layers: int) -> ModelInfo:
    return ModelInfo(hidden_size=16, vocab_size=256, num_layers=layers)


def controls(layers: int, steps: int = 80) -> dict:
    return {arm.name: arm for arm in arms.control_arms(info(layers), steps)}


def test_at_the_papers_depth_the_table_is_the_papers():
    table = controls(17)
    assert table["ntp"].paper == 21.10 and table["nitp"].paper == 23.58
    assert NITP().layer(info(17)) == 4 and "target layer 4" not in table
    sweep = {name: arm.paper for name, arm in table.items() if name.startswith("target layer")}
    assert sweep == {
        "target layer 0": 20.72,
        "target layer 2": 22.01,
        "target layer 6": 22.12,
        "target layer 8": 21.22,
        "target layer 14": 22.16,
    }
    ablations = {
        "same position": ("ntp + nitp(shift=0)", 18.75),
        "mse": ("ntp + nitp(distance=mse)", 19.38),
        "smooth-L1": ("ntp + nitp(distance=smooth_l1)", 23.24),
        "kl": ("ntp + nitp(distance=kl)", 22.88),
        "no stop-gradient": ("ntp + nitp(stop_gradient=False)", 18.23),
        "no projector": ("ntp + nitp(projector=none)", 20.64),
        "from step 10": ("ntp + schedule(to=1.0, begin=10)*nitp", 21.22),
        "from step 20": ("ntp + schedule(to=1.0, begin=20)*nitp", 21.40),
        "from step 30": ("ntp + schedule(to=1.0, begin=30)*nitp", 20.17),
    }
    for name, (expression, paper) in ablations.items():
        assert (table[name].expression, table[name].paper) == (expression, paper)
        assert table[name].spec == parse(expression)
    assert table["linear projector"].paper is None


@pytest.mark.parametrize(
    ("layers", "block", "paper"), [(3, 2, 22.16), (4, 2, 21.22), (5, 2, 22.12), (28, 23, 22.16)]
)
def test_an_arm_of_the_sweep_carries_the_score_of_the_nearest_depth(layers, block, paper):
    assert controls(layers)[f"target layer {block}"].paper == paper


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8, 17, 28])
@pytest.mark.parametrize("steps", [1, 3, 200])
def test_at_any_depth_and_length_no_two_arms_are_equal_and_each_fits_the_model(layers, steps):
    table = arms.control_arms(info(layers), steps)
    default = NITP().layer(info(layers))
    targets = [
        arm.spec.terms[1].layer(info(layers)) for arm in table if arm.name.startswith("target")
    ]
    assert (
        len(set(targets)) == len(targets)
        and default not in targets
        and all(0 <= k < layers for k in targets)
    )
    for one in ("name", "folder", "expression"):
        assert len({getattr(arm, one) for arm in table}) == len(table)
    begins = [arm.spec.terms[1].weight.begin for arm in table if arm.name.startswith("from step")]
    assert all(0 < begin < steps for begin in begins)


def test_an_objective_that_is_not_registered_has_no_arm(monkeypatch):
    monkeypatch.setattr(arms, "parse_spec", lambda _: parse("ntp"))
    for known in (("nitp", "ntp"), ("cosine_regularizer", "nitp", "ntp")):
        monkeypatch.setattr(arms, "available", lambda known=known: known)
        assert [name for name in controls(5) if "cosine" in name] == ["cosine regulariser"] * (
            len(known) - 2
        )


def names(*more: str) -> list[str]:
    return [arm.name for arm in arms.arms_of(options.parse(list(more)))]


def test_controls_and_objectives_together_add_only_what_the_table_lacks():
    assert names() == ["ntp", "ntp + nitp"]
    table = names("--controls")
    assert table[:2] == ["ntp", "nitp"] and len(table) > 12
    assert names("--controls", "--objectives", "ntp+nitp", "ntp + 0.5*nitp") == [
        *table,
        "ntp + 0.5*nitp",
    ]


def test_control_arms_are_short_unless_the_user_says_otherwise():
    assert options.parse(["--controls"]).steps < options.parse([]).steps == 600
    assert options.parse(["--controls", "--steps", "7"]).steps == 7


def test_equal_labels_get_folders_of_their_own():
    formatted = arms.arms_of(
        options.parse(["--objectives", "ntp + nitp", "ntp + 2*nitp", "ntp", "ntp + nitp(shift=0)"])
    )
    assert [arm.folder for arm in formatted] == ["ntp-nitp", "ntp-nitp.2", "ntp", "ntp-nitp.3"]


def test_every_bad_objective_is_reported_at_once(text, tmp_path, capsys):
    wrong = [
        "ntp + niptp",
        "ntp",
        "ntp(z_los=1) + nitp(target_layer=9)",
        "ntp + nitp(target_layer=3)",
    ]
    assert pretrain.main(arguments(text, tmp_path / "out", "--objectives", *wrong)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith('pretrain: --objectives "ntp') for line in lines)
    assert "niptp" in lines[0] and "z_los" in lines[1] and "target_layer is 3" in lines[2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lr", "inf"], "--lr: inf is no finite number"),
        (["--lr", "nan"], "--lr: nan is no finite number"),
        (["--clip", "-inf"], "--clip"),
        (["--weight-decay", "inf"], "--weight-decay"),
        (["--seeds", "0", "1", "0"], "a seed is given twice"),
        (["--seeds", "-1"], "--seed"),
    ],
)
def test_numbers_that_are_none_and_seeds_that_repeat_are_refused(
    text, tmp_path, capsys, more, said
):
    assert pretrain.main(arguments(text, tmp_path / "out", *more)) == 2
    assert said in complaint(capsys) and not (tmp_path / "out").exists()


def test_each_seed_is_a_run_of_its_own_and_the_first_equals_the_run_without_others(
    text, tmp_path, capsys
):
    assert (
        pretrain.main(
            arguments(text, tmp_path / "one", "--seed", "3", "--objectives", "ntp", "--steps", "6")
        )
        == 0
    )
    more = ["--seeds", "3", "4", "--objectives", "ntp", "ntp + nitp", "--steps", "6"]
    assert pretrain.main(arguments(text, tmp_path / "two", *more)) == 0
    three, four = (tmp_path / "two" / "ntp" / f"seed-{seed}" for seed in (3, 4))
    assert steps_without_times(three) == steps_without_times(tmp_path / "one" / "ntp")
    assert steps_without_times(three)[0]["ntp/loss"] != steps_without_times(four)[0]["ntp/loss"]
    looks = [
        float(checkpoint.read_table(folder / "validation.csv")[-1]["cross_entropy"])
        for folder in (three, four)
    ]
    printed = capsys.readouterr().out
    low, high = sorted(looks)
    assert f"{(low + high) / 2:.4f} ± {(high - low) / 2**0.5:.4f}" in printed
    assert 'less "ntp", paired by seed' in printed and "No verdict below five seeds" in printed


def test_the_control_table_runs_to_its_end_from_one_command(text, tmp_path, capsys):
    assert (
        pretrain.main(arguments(text, tmp_path, "--controls", "--steps", "4", "--eval-every", "4"))
        == 0
    )
    printed = capsys.readouterr().out
    assert "No benchmark is measured here" in printed
    for arm in arms.arms_of(options.parse(arguments(text, tmp_path, "--controls", "--steps", "4"))):
        assert (tmp_path / arm.folder / "model.safetensors").exists(), arm.name
        assert len(steps_without_times(tmp_path / arm.folder)) == 4
