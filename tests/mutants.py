"""Mutants: one-line edits of kernels and objectives, each of which must turn the named tests red.

    python tests/mutants.py [WORD ...]      # all, or those whose file or edit holds one of the words

Every edit is made in a copy of the tree, so nothing here is ever wrong. A formula header is compiled by the tests that
run the CUDA sources on the CPU. The named tests must be green before and red (exit code 1: failed, not broken) after.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "nitp_ops", "objectives", "examples", "benchmarks", "tests", "docs", "pyproject.toml")


class Mutant(NamedTuple):
    """The file, its text (once in it), what stands there instead, and the tests that must fail."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # what a row's loss and gradient are
    Mutant("csrc/cross_entropy.h", "mass + A(2) * z_loss * lse", "mass + z_loss * lse", "cuda_source"),
    Mutant("csrc/cross_entropy.h", "(z / cap) * (z / cap)) : scale", "(z / cap)) : scale", "cuda_source"),
    Mutant("csrc/alignment.h", "1 / (p * z))) : A(0)", "1 / p)) : A(0)", "cuda_source_rows"),
    Mutant("csrc/swiglu.h", "A(1) + g * (A(1) - s)", "A(1) + g * s", "cuda_source_rows"),
    # every barrier of a cluster's row: before the warps, then the blocks, read one another, before a block may end, and
    # before the targets are written over what their blocks wrote
    Mutant("csrc/cuda/reduce.h", "__syncthreads();\n  return warp_merge", "return warp_merge", "cuda_source_clusters"),
    Mutant("csrc/cuda/reduce.h", "Team::sync();\n    const int lane", "const int lane", "cuda_source_clusters"),
    Mutant("csrc/cuda/cross_entropy.cu", "Team::sync();  // the peers have read", "", "cuda_source_clusters"),
    Mutant("csrc/cuda/cross_entropy.cu", "Team::sync();\n  if (rank", "if (rank", "cuda_source_clusters"),
    Mutant("csrc/cuda/cross_entropy.cu", "  wait_for_copies();\n", "", "cuda_source_clusters"),
    Mutant("nitp_ops/triton/swiglu.py", "(1 + g * (1 - s))", "(1 + g * s)", "triton_kernels"),
    # the chunked algorithms
    Mutant("nitp_ops/_token_chunks.py", "logits.sum(0, dtype=sums.d_bias.dtype)", "logits[0]", "linear_cross_entropy"),
    Mutant(
        "nitp_ops/_token_chunks.py",
        "hidden if all_live else with_zeros(hidden[:n].masked_fill(~live.unsqueeze(1), 0), even)",
        "hidden",
        "linear_cross_entropy token_semantics objectives_plan",
    ),
    Mutant("nitp_ops/_token_chunks.py", "padded[n:].zero_()", "pass", "even_rows"),
    Mutant("nitp_ops/_token_chunks.py", "if sum(loud) > 1 else None", "if len(jobs) > 1 else None", "numerics"),
    Mutant("nitp_ops/_token_chunks.py", "and jobs[job].wanted == wanted]", "and wanted]", "shared_pass"),
    Mutant("nitp_ops/_token_chunks.py", "dtype=widest(device, dtype)", "dtype=dtype", "shared_pass"),
    Mutant("nitp_ops/_chunks.py", "if longest is not None:  # no more", "if False:  # no more", "numerics"),
    Mutant("nitp_ops/_chunks.py", "block.nbytes > _MAPPED_BYTES", "block.nbytes < 0", "workspace"),
    Mutant("nitp_ops/_gemm.py", "gradient[end - len(piece) : end]", "gradient[: len(piece)]", "numerics"),
    Mutant("nitp_ops/_gemm.py", "first += len(piece)", "first += 0", "numerics"),
    Mutant(
        "nitp_ops/_explain.py",
        "even_rows(min(together, step), torch.device(device), dtype)",
        "min(together, step)",
        "even_rows",
    ),
    Mutant("nitp_ops/_chunks.py", "rows - len(chunk)))", "rows - len(chunk)), 1)", "even_rows"),
    Mutant("nitp_ops/_token_chunks.py", "given & (labels >= 0) if many else", "given if many else", "token_semantics"),
    Mutant(
        "nitp_ops/_head_job.py", "torch.where(total == 0, 1, total)", "total", "linear_cross_entropy token_semantics"
    ),
    Mutant(
        "nitp_ops/_head_job.py",
        "torch.where(given, rows.target_weight.squeeze(1), 0).sum()",
        "given.sum()",
        "token_semantics",
    ),
    Mutant(
        "nitp_ops/_latent_chunks.py", "slice(part.start + shift, part.stop + shift)", "part", "implicit_token_loss"
    ),
    Mutant("nitp_ops/_latent_chunks.py", "(part + shift).clamp_", "(part + shift - 1).clamp_", "implicit_token_loss"),
    Mutant("nitp_ops/_gradients.py", "recompute() if self.gradients is None else", "[] if False else",
           "linear_cross_entropy"),
    Mutant("nitp_ops/_gradients.py", "buffer.addcmul_(gradient, upstream.to(buffer.dtype))", "buffer.add_(gradient)",
           "token_semantics"),
    # which rows count, and what divides them
    Mutant("objectives/shift.py", "streams.spans, k)", "streams.spans, k - 1)", "objectives_shift"),
    Mutant("objectives/shift.py", "k, streams, -1) == here) & (here >= 0)", "k, streams, -1) == here)",
           "objectives_shift objectives_properties"),
    Mutant("objectives/shift.py", "values.new_full((values.shape[0], missing), fill)", "values[:, :missing]",
           "objectives_shift"),
    Mutant("objectives/shift.py", "streams, -1) <= place", "streams, -1) < place", "objectives_top"),
    # whose document a pre-shifted label belongs to, and where what the streams say of its token is asked
    Mutant("objectives/shift.py", "_after_unknown(here, -1)", "torch.cat([here, here[:, -1:]], dim=1)",
           "objectives_label_layout"),
    Mutant("objectives/shift.py", 'if streams.label_layout == "document" else ~inside', "", "objectives_label_layout"),
    Mutant("objectives/shift.py", "masked | (inside & ~", "masked | (~", "objectives_shift"),
    Mutant("objectives/shift.py", ".masked_fill(~valid_pairs(streams, k), 0)", "", "objectives_label_layout"),
    Mutant("objectives/shift.py", ".masked_fill(~valid_pairs(streams, k), 1.0)", "", "objectives_label_layout"),
    Mutant("objectives/shift.py", ".masked_fill(~pairs, 1.0)", "", "objectives_label_layout"),
    Mutant("nitp_ops/integrations/token_streams.py", '("cu_seq_lens_q", "cu_seqlens")', '("cu_seq_lens_q",)',
           "integrations_label_layout"),
    Mutant("objectives/documents.py", "positions[:, :-1] + 1", "positions[:, :-1]", "objectives_shift"),
    Mutant("objectives/composite.py", '== "mean" else 1', '== "sum" else 1', "objectives_ranks"),
    Mutant("objectives/composite.py", ".clamp(min=1)\n            for name", "\n            for name",
           "objectives_properties"),
    Mutant("objectives/composite.py", "torch.where(own[piece] == 0, 0, part.loss)", "part.loss", "objectives_plan"),
    Mutant("objectives/guard.py", "torch.where(alive, gradients[0], 0)", "gradients[0]", "objectives_plan"),
    Mutant("objectives/head_parts.py", "self.term == other.term and ", "", "objectives_mtp_shared objectives_plan"),
    Mutant("objectives/head_parts.py", "torch.where(present, loud, 0)", "present.to(loud.dtype)", "objectives_sets"),
    Mutant("objectives/head_parts.py", "(1 - self.rows.label_smoothing) * (", "(", "objectives_mtp_shared"),
    # the objectives
    Mutant("objectives/nitp.py", "* info.num_layers + 0.75", "* info.num_layers", "objectives_build"),
    Mutant("objectives/nitp.py", "(context.guard(z), self.shift)", "(z.detach(), self.shift)",
           "nitp_stop_gradient"),
    Mutant("objectives/nitp.py", "z[:, shift:]", "z[:, :pairs]", "objectives_values"),
    Mutant("objectives/floor.py", "math.nan, 1 - loss / floor", "math.nan, loss / floor",
           "nitp_floor objectives_metrics"),
    Mutant("objectives/floor.py", "begin + shift : end + shift", "begin : end", "nitp_floor objectives_metrics"),
    Mutant("objectives/mtp_sequential.py", "return 1 / self.depth", "return 1.0", "objectives_mtp_sequential"),
    Mutant("objectives/mtp_sequential.py", "normed if self.normed", "state if self.normed",
           "objectives_mtp_sequential"),
    Mutant("objectives/mtp_parallel.py", "streams, f, k)", "streams, f, 1)", "objectives_mtp_parallel"),
    Mutant("objectives/top.py", "self.window - torch.arange", "torch.arange", "objectives_top"),
    Mutant("objectives/regularizers.py", "- unit.square().sum()", "", "objectives_regularizers"),
    Mutant("objectives/nextlat.py", "log_p.exp() - q", "q - log_p.exp()", "objectives_nextlat"),
    Mutant("objectives/fsp_bow.py", "ahead[..., 1:] != ahead[..., :-1]", "ahead[..., 1:] >= 0", "objectives_fsp_bow"),
    Mutant("objectives/ntp.py", "replace(rows, class_weight=", "replace(rows, token_weight=",
           "objectives_class_weight"),
    Mutant("objectives/schedule.py", "torch.where(step >= begin", "torch.where(step > begin", "objectives_schedule"),
    Mutant("objectives/metrics.py", 'own["weighted"] / own', 'own["loss"] / own', "objectives_metrics"),
    Mutant("objectives/counts.py", "self[part] + other[part]", "other[part]", "objectives_properties"),
    # drafting and decoding
    Mutant("objectives/drafting.py", "== drafts).cumprod(0)", "== drafts)", "objectives_draft"),
    Mutant("objectives/drafters.py", "max(0, same - k)", "max(0, same)", "objectives_draft"),
    Mutant("objectives/blocks.py", ".unsqueeze(-1) >= place\n        return", ".unsqueeze(-1) > -1\n        return",
           "objectives_draft"),
    Mutant("examples/pretraining/model.py", "self.cosine[start:stop]", "self.cosine[: stop - start]", "pretrain_draft"),
)  # fmt: skip


def files_of(mutant: Mutant) -> list[str]:
    """Paths of the tests that must fail."""
    return [f"tests/test_{name}.py" for name in mutant.tests.split()]


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the edit.

    Raises:
        ValueError: the text does not hold the edit's place once.
    """
    if (found := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} stands there {found} times, expected once")
    return text.replace(mutant.old, mutant.new)


def copied(folder: Path) -> None:
    """The tree, importable in place: the installed mapping of objectives/ becomes a link."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, folder / name)
    (folder / "nitp_ops/objectives").symlink_to("../objectives")


def run(folder: Path, files: list[str]) -> int:
    """Exit code of the tests in the copy, up to the first that fails."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode > 1:
        print(done.stdout.decode(errors="replace")[-2000:])
    return done.returncode


def main(words: list[str]) -> int:
    """Try every chosen mutant; 1 where one survives or its tests are broken."""
    chosen = [m for m in MUTANTS if not words or any(word in " ".join(m) for word in words)]
    if not chosen:
        print(f"mutants: no mutant holds {' or '.join(words)}")
        return 2
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        for file in dict.fromkeys(file for mutant in chosen for file in files_of(mutant)):
            if (code := run(folder, [file])) != 0:
                print(f"mutants: {file} ends with exit code {code} without any edit; make test comes first")
                return 1
        for number, mutant in enumerate(chosen, start=1):
            path = folder / mutant.file
            text = path.read_text()
            path.write_text(mutated(mutant, text))
            code = run(folder, files_of(mutant))
            path.write_text(text)
            verdict = {0: "SURVIVED", 1: "killed"}.get(code, f"BROKEN (exit code {code})")
            survivors += [mutant] if code != 1 else []
            print(f"{number:>2}/{len(chosen)} {verdict}: {mutant.file}: {mutant.old!r} -> {mutant.new!r}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
