"""Drafting on the decoder of the examples: a cache changes nothing, drafts change the speed only,
heads on request."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples import draft, pretrain
from experiments.train import decoding, heads, model, run
from nitp_ops.objectives import ModelInfo, build
from tests.experiments.pretrain_cases import arguments

SPECS = ("ntp + mtp_shared", "ntp + mtp_parallel", "ntp + mtp_sequential(depth=3)")


def decoder(**changes):
    shapes: dict[str, Any] = {
        "vocab_size": 7,
        "dim": 24,
        "layers": 3,
        "heads": 6,
        "kv_heads": 2,
        "context": 40,
    } | changes
    return model.Decoder(model.ModelConfig(initializer_range=0.5, **shapes), seed=3).double()


def objective(spec: str, net) -> torch.nn.Module:
    info: ModelInfo = run.model_info(net.config)
    return build(spec, model=info, seed=1).double()


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 4, 2], [3, 9]])
def test_reading_with_a_cache_is_reading_the_whole(pieces):
    net, trunk = decoder(), None
    ids = torch.randint(7, (1, 12), generator=torch.Generator().manual_seed(0))
    whole, trunk = net(ids), decoding.Cached(net)
    for piece in ids.split(pieces, dim=1):
        start = trunk.past[0].length
        trunk.extend(torch.full((1, 2), 6))  # read and forgotten
        trunk.cut(start)
        streams, stop = trunk.extend(piece), start + piece.shape[1]
        torch.testing.assert_close(
            streams.last_hidden, whole.last_hidden[:, start:stop], rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            streams.last_residual, whole.last_residual[:, start:stop], rtol=1e-12, atol=1e-12
        )


@torch.no_grad()
def test_plain_decoding_takes_the_most_probable_token_of_the_whole_model():
    net, ids = decoder(), torch.tensor([[1, 4, 2]])
    found = decoding.greedy(net, ids, 20)
    for length in range(3, 23):
        assert found[0, length] == net.lm_head(net(found[:, :length]).last_hidden[0, -1]).argmax()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("seed", range(4))
def test_drafted_text_is_plain_text(spec, seed):
    net = decoder()
    prompt = torch.randint(7, (1, 1 + 3 * seed), generator=torch.Generator().manual_seed(seed))
    found = decoding.compare("a", net, objective(spec, net), [prompt], 24)
    assert found.parted == [] and found.new_tokens == 24
    assert torch.equal(found.drafts[0].token_ids, decoding.greedy(net, prompt, 24))


@torch.no_grad()
def test_texts_that_part_are_told_with_the_gap(monkeypatch):
    net, prompt = decoder(), torch.tensor([[1, 4, 2]])
    plain = decoding.greedy(net, prompt, 10)
    other = plain.clone()
    other[0, 7] = (other[0, 7] + 1) % 7
    monkeypatch.setattr(decoding, "greedy", lambda *_: other)
    ((place, gap),) = decoding.compare("a", net, objective(SPECS[1], net), [prompt], 10).parted
    logits = net.lm_head(net(plain[:, :7]).last_hidden[0, -1])
    assert (
        place == 7
        and gap == pytest.approx(float(logits[other[0, 7]] - logits[plain[0, 7]]))
        and gap < 0
    )


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(
        ValueError,
        match=r"^Decoder: 41 tokens came, expected at most context = "
        r"40$",
    ):
        decoding.greedy(decoder(), torch.zeros(1, 38, dtype=torch.int64), 4)


ROOM = ["--prompts", "2", "--prompt-tokens", "4", "--new-tokens", "12"]


def of_draft(text, out, *more):
    return [x for x in arguments(text, out, *ROOM, *more) if x != "--no-fused-head"]


def test_the_demonstration_trains_exports_and_decodes(text, tmp_path, capsys):
    assert draft.main(of_draft(text, tmp_path / "out", "--objectives", *SPECS)) == 0
    first = capsys.readouterr().out
    assert all(spec in first for spec in SPECS)
    (alike,) = (
        line for line in first.splitlines() if "prompts with the text of plain decoding" in line
    )
    assert alike.count("2 of 2") == len(SPECS)
    folders = [
        tmp_path / "out" / f"ntp-mtp_{kind}" for kind in ("shared", "parallel", "sequential")
    ]
    assert draft.main(of_draft(text, tmp_path / "none", "--from", *map(str, folders))) == 0
    again = capsys.readouterr().out
    assert not (tmp_path / "none").exists() and "starts in" not in again
    assert again.count("2 of 2") == len(SPECS)
    _, own = heads.load_exported(folders[1])
    assert sum(p.numel() for p in own.parameters()) > 0


def test_heads_are_exported_on_request_only_and_come_back_as_they_were(text, tmp_path):
    spec = "ntp + mtp_parallel(offsets=[2])"
    for name, asked in (("without", []), ("with", ["--keep-heads"])):
        assert (
            pretrain.main(
                arguments(text, tmp_path / name, "--steps", "2", "--objectives", spec, *asked)
            )
            == 0
        )
    plain, kept = (tmp_path / name / "ntp-mtp_parallel" for name in ("without", "with"))
    assert not (plain / "heads.safetensors").exists()
    assert (plain / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
    _, own = heads.load_exported(kept)
    stored = torch.load(kept / "checkpoint.pt", weights_only=True)["objective"]
    assert own.state_dict().keys() == stored.keys() != set()
    assert all(torch.equal(value, stored[name]) for name, value in own.state_dict().items())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (
            ["--objectives", "ntp + nitp"],
            '--objectives "ntp + nitp": no term can draft, expected one mtp_shared',
        ),
        (["--objectives", "ntp + mtp_shared + top", "nitpp"], '"nitpp" is no objective'),
        (["--objectives", SPECS[0] + " + a: mtp_sequential"], "mtp_shared, a can draft"),
        (
            ["--new-tokens", "13"],
            "--prompt-tokens 4 --new-tokens 13: 17 tokens, expected at most the context of 16",
        ),
        (["--from", "/nowhere"], "/nowhere/model.safetensors: no such file"),
        (["--seeds", "1", "2"], "--seeds 1 2: expected one seed"),
    ],
)
def test_what_can_not_be_decoded_is_refused_in_one_line(text, tmp_path, capsys, more, named):
    assert draft.main(of_draft(text, tmp_path / "out", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("draft: ") and named in line


def test_damaged_heads_are_refused_by_name(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert draft.main(of_draft(text, out, "--steps", "1", "--objectives", SPECS[1])) == 0
    folder = out / "ntp-mtp_parallel"
    whole = (folder / "heads.safetensors").read_bytes()
    capsys.readouterr()
    for content in (b"", whole[: len(whole) // 2], (folder / "model.safetensors").read_bytes()):
        (folder / "heads.safetensors").write_bytes(content)
        assert draft.main(of_draft(text, out, "--from", str(folder))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            (f"draft: {folder}: its exp", f"draft: {folder / 'heads.safetensors'}: not readable")
        )
    (folder / "heads.safetensors").write_bytes(whole)
    for name in ("heads.safetensors", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
        assert draft.main(of_draft(text, out, "--from", str(folder))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"draft: {folder / name}: damaged, its checksum does not match")
        (folder / name).write_bytes(content)
