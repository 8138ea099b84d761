"""The edits of tests/mutants/run.py in the ops' kernels, chunked algorithms and objectives, and the tests that must die."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """The file, its text (once in it), what stands there instead, and the tests that must fail.

    tests: words, each the name of a file between "test_" and ".py", or name::function.
    """

    file: str
    old: str
    new: str
    tests: str


MUTANTS: tuple[Mutant, ...] = (
    # what a row's loss and gradient are
    Mutant("csrc/formulas/cross_entropy.h", "weight_sum + A(2) * z_loss * lse", "weight_sum + z_loss * lse",
           "kernels/cuda_source/operators"),
    Mutant(
        "csrc/formulas/cross_entropy.h",
        "quotient(z, cap) * quotient(z, cap)) : scale",
        "quotient(z, cap)) : scale",
        "kernels/cuda_source/operators",
    ),
    Mutant("csrc/formulas/alignment.h", "1 / (p * z))) : A(0)", "1 / p)) : A(0)", "kernels/cuda_source/rows"),
    Mutant("csrc/formulas/swiglu.h", "A(1) + g * (A(1) - s)", "A(1) + g * s", "kernels/cuda_source/rows"),
    # every meeting of the threads of a row: of the warps of a block, of the blocks of a cluster, of a warp before it
    # writes the targets over what it wrote; what rounding leaves out of the exponent
    Mutant("csrc/cuda/reduce.h", "__syncthreads();\n  return warp_merge", "return warp_merge", "kernels/cuda_source/clusters"),
    Mutant("csrc/cuda/reduce.h", "    inboxes_are_open();\n", "", "kernels/cuda_source/clusters"),
    Mutant("csrc/cuda/reduce.h", "    await_messages(mail);\n", "", "kernels/cuda_source/clusters"),
    Mutant("csrc/cuda/cross_entropy/cross_entropy.cu", "  __syncwarp();\n", "", "kernels/cuda_source/clusters"),
    Mutant(
        "csrc/cuda/cross_entropy/cross_entropy.cu",
        "if (f.own_weight != A(0)) f.gap += f.own_weight * (row.unit * raised);",
        "",
        "kernels/cuda_source/clusters",
    ),
    Mutant("csrc/cuda/cross_entropy/exponential.h", "return exp2_of(-residual);", "return 1.0f;",
           "kernels/cuda_source/extremes"),
    Mutant("csrc/cuda/cross_entropy/exponential.h", "rate = base_rate = without_fraction(base_rate);", "",
           "kernels/cuda_source/extremes"),
    Mutant("csrc/cuda/cross_entropy/row.h", "return half_tanh(", "return gradient_tanh<T>(", "kernels/cuda_source/extremes"),
    Mutant("csrc/cuda/cross_entropy/row.h", " || (W == 1 && top == s.max && j < s.first)", "", "kernels/cuda_source/operators"),
    Mutant(
        "csrc/cuda/launch.h",
        "entry = latest_ = new Entry",
        "entry = new Entry",
        "kernels/cuda_source/geometry",
    ),
    Mutant("csrc/cuda/cross_entropy/cross_entropy.cu", "  wait_for_copies();\n", "", "kernels/cuda_source/clusters"),
    Mutant("nitp_ops/kernels/triton/swiglu.py", "(1 + g * (1 - s))", "(1 + g * s)", "kernels/triton_source/kernels"),
    # the chunked algorithms
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "self.logits.sum(0, dtype=accumulator.dtype)", "self.logits[0]",
           "ops/cross_entropy/linear_cross_entropy"),
    Mutant(
        "nitp_ops/ops/cross_entropy/head_pass.py",
        "with_zeros(hidden[:count].masked_fill(chunk.inactive, 0), padded)",
        "hidden",
        "ops/cross_entropy/linear_cross_entropy ops/cross_entropy/token_semantics engine/plan",
    ),
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "logits[count:].zero_()", "pass", "core/even_rows"),
    Mutant("nitp_ops/ops/cross_entropy/chunked.py", "= sum(each.may_be_active for each in of_terms) > 1", "= len(of_terms) > 1",
           "ops/numerics"),
    Mutant("nitp_ops/ops/cross_entropy/chunked.py", "if call.want_hidden[place] == wanted]", "if wanted]", "ops/cross_entropy/shared_pass"),
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "width), dtype=policy.out_dtype", "width), dtype=policy.dtype", "ops/cross_entropy/shared_pass"),
    Mutant("nitp_ops/core/chunking.py", "if longest is not None:  # no more", "if False:  # no more", "ops/numerics"),
    Mutant("nitp_ops/core/chunking.py", "block.nbytes > _MAPPED_BYTES", "block.nbytes < 0", "core/workspace"),
    Mutant("nitp_ops/core/gemm.py", "gradient[end - len(piece) : end]", "gradient[: len(piece)]", "ops/numerics"),
    Mutant("nitp_ops/core/gemm.py", "first += len(piece)", "first += 0", "ops/numerics"),
    Mutant("nitp_ops/core/gemm.py", "numbers < SPLIT_NUMBERS", "numbers < 0", "core/gemm_policy"),
    Mutant("nitp_ops/core/gemm.py", "out.float() if add else", "out.float() if False else", "core/gemm_policy"),
    Mutant("nitp_ops/core/chunking.py", "-(-columns // _ALIGNED) * _ALIGNED", "columns", "core/gemm_policy"),
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "self.rounded[:padded].copy_(logits)", "self.rounded[:padded]", "core/gemm_policy"),
    Mutant("nitp_ops/ops/cross_entropy/vocab_shard.py", "async_op=self.overlap", "async_op=True", "distributed/ops/vocab_parallel"),
    Mutant(
        "nitp_ops/ops/chunk_plan.py",
        "pad_to_alignment(min(together, step), torch.device(device), dtype)",
        "min(together, step)",
        "core/even_rows",
    ),
    Mutant("nitp_ops/core/chunking.py", "rows - len(chunk)))", "rows - len(chunk)), 1)", "core/even_rows"),
    Mutant("nitp_ops/ops/cross_entropy/labelled_rows.py", "(given & (rows.labels >= 0) if several else", "(given if several else",
           "ops/cross_entropy/token_semantics"),
    # what labels say, before the chunks and after them
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "torch.where(total == 0, 1, total)", "total", "kernels/labelled_rows"),
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "torch.where(scale == 0, 0, scale / divisor.view(()))",
           "scale / divisor.view(())", "kernels/labelled_rows"),
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "torch.where(present, weight[:, 0], 0).to(sum_dtype(labels.device))",
           "present", "kernels/labelled_rows ops/cross_entropy/token_semantics"),
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "row_weight.view(-1)", "row_weight", "kernels/labelled_rows"),
    Mutant("nitp_ops/kernels/torch_rows/cross_entropy.py", "else best.masked_fill(~active, -1)", "else best", "kernels/labelled_rows"),
    Mutant("csrc/formulas/labels.h", "a.mean && count != 0.0", "a.mean", "kernels/cuda_source/labels"),
    Mutant("csrc/formulas/labels.h", "a.scale[row] == A(0) ? 0.0 :", "", "kernels/cuda_source/labels"),
    Mutant("csrc/cuda/prepare.cu", "first += kAtOnce * kAdders", "first += kAdders", "kernels/cuda_source/labels"),
    Mutant("csrc/cuda/cross_entropy/cross_entropy.cu", "absent && !a.softmax_partials ? -1 : best", "best",
           "kernels/cuda_source/labels"),
    Mutant("nitp_ops/kernels/triton/prepare.py", "too_many & has, float", "too_many, float", "kernels/triton_source/labels"),
    Mutant("nitp_ops/kernels/triton/cross_entropy.py", "best = tl.where(present > 0, best, -1)", "pass", "kernels/triton_source/labels"),
    Mutant(
        "nitp_ops/ops/implicit_token/chunked.py", "slice(part.start + shift, part.stop + shift)", "part", "ops/implicit_token_loss"
    ),
    Mutant("nitp_ops/ops/implicit_token/chunked.py", "(part + shift).clamp_", "(part + shift - 1).clamp_", "ops/implicit_token_loss"),
    Mutant("nitp_ops/ops/gradients.py", "recompute() if self.gradients is None else", "[] if False else",
           "ops/cross_entropy/linear_cross_entropy"),
    Mutant("nitp_ops/ops/gradients.py", "upstream.to(reference.working(gradient)), _rows(out)",
           "torch.ones_like(upstream).to(reference.working(gradient)), _rows(out)", "ops/op_laws"),
    Mutant("nitp_ops/ops/gradients.py", "upstream.to(buffer.dtype)", "torch.ones_like(upstream).to(buffer.dtype)",
           "ops/cross_entropy/token_semantics"),
    # what weighs nothing reaches nothing
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "x if self.inactive is None else x.masked_fill_(self.inactive, 0)", "x",
           "ops/inactive_rows"),
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "((weight != 0) & given)", "given", "ops/inactive_rows kernels/labelled_rows"),
    Mutant("csrc/formulas/labels.h", "a.target_weight[k] != A(0)", "true", "kernels/cuda_source/labels"),
    Mutant("nitp_ops/ops/implicit_token/chunked.py", "d_h.masked_fill_(~pairs.keep[part].unsqueeze(1), 0)", "pass",
           "ops/inactive_rows"),
    Mutant("nitp_ops/core/checks.py", "return guard_scalar(value)", "return value", "ops/compiled_options"),
    Mutant("objectives/latent/nitp.py", "z = z.masked_fill(~targets.unsqueeze(-1), 0)", "pass", "engine/streams/padding"),
    # rows whose squares overflow
    Mutant("csrc/formulas/alignment.h", "sum_of_squares > A(most)", "sum_of_squares < A(0)", "kernels/cuda_source/rows"),
    Mutant("nitp_ops/kernels/triton/alignment.py", "square > most, shrink", "square > most, 1.0", "kernels/triton_source/kernels"),
    # rows of logits under Triton, and where the vocabulary or the sequence is sharded
    Mutant("nitp_ops/kernels/triton/cross_entropy.py", "tl.where(step > 0, first, found)", "tl.where(step >= 0, first, found)",
           "kernels/triton_source/cross_entropy"),
    Mutant("nitp_ops/kernels/triton/cross_entropy.py", "below -= tl.where(step > 0, weights * step, 0.0)", "below -= 0.0",
           "kernels/triton_source/cross_entropy"),
    Mutant("nitp_ops/kernels/triton/cross_entropy_gradient.py", "(1 - ratio * ratio)", "(1 - ratio)", "kernels/cuda_source/shard_rows"),
    Mutant("nitp_ops/kernels/triton/scale.py", "tl.where(by == 0, 0.0, scaled)", "scaled", "kernels/triton_source/kernels"),
    Mutant("nitp_ops/ops/cross_entropy/vocab_shard.py", "(fraction * fields[\"sum\"])", "fields[\"sum\"]", "distributed/ops/vocab_parallel"),
    Mutant("nitp_ops/ops/cross_entropy/vocab_shard.py", "apart = (top - peak) * fields", "apart = 0 * fields", "distributed/ops/vocab_parallel"),
    Mutant("nitp_ops/ops/cross_entropy/vocab_shard.py", "(best + self.first).to(bits)", "best.to(bits)", "distributed/ops/vocab_parallel"),
    Mutant("nitp_ops/ops/cross_entropy/sharded/sequence_rows.py", "dist.get_rank(group) * count, count", "0, count", "distributed/ops/sequence_parallel"),
    Mutant("nitp_ops/engine/streams/context_parallel.py", "(rank, 2 * ranks - 1 - rank)", "(rank, ranks + rank)",
           "engine/footprint"),
    Mutant("nitp_ops/geometry/streaming.py", "* (n * m / (n + m))", "* (n * m / n)", "geometry/geometry"),
    # which rows count, and what divides them
    Mutant("nitp_ops/engine/streams/targets.py", "values, k, *span", "values, k - 1, *span", "engine/streams/shift"),
    Mutant("nitp_ops/engine/streams/targets.py", "k, streams, -1) == here) & (here >= 0)", "k, streams, -1) == here)",
           "engine/streams/shift objectives/properties"),
    Mutant("nitp_ops/engine/streams/targets.py", "(size - first)), fill)", "(size - first)), 0)", "engine/streams/shift"),
    Mutant("nitp_ops/engine/streams/targets.py", "high < vocabulary and absent", "high < vocabulary", "engine/shortcuts"),
    Mutant("nitp_ops/engine/streams/targets.py", "self.previous[at] < place", "self.previous[at] <= place", "objectives/tokens/top"),
    Mutant("nitp_ops/engine/streams/targets.py", "(k <= self.last) &", "(k < self.last) &", "objectives/tokens/top"),
    Mutant("nitp_ops/engine/streams/targets.py", "range(first - 1)", "range(0)", "engine/streams/windows"),
    Mutant("nitp_ops/engine/streams/targets.py", "(coming - base)", "coming", "engine/streams/windows"),
    Mutant("nitp_ops/engine/streams/targets.py", "place + 1, after[:, 1:])", "after[:, 1:], after[:, 1:])", "objectives/tokens/top"),
    Mutant("objectives/tokens/top.py", "math.ceil(-math.log(", "math.ceil(-0.1 * math.log(", "engine/streams/windows"),
    # whose document a pre-shifted label belongs to, and where what the streams say of its token is asked
    Mutant("nitp_ops/engine/streams/targets.py", "_after_unknown(here, -1)", "torch.cat([here, here[:, -1:]], dim=1)",
           "engine/streams/label_layout"),
    Mutant("nitp_ops/engine/streams/targets.py", 'if streams.label_layout == "document" else ~inside', "",
           "engine/streams/label_layout"),
    Mutant("nitp_ops/engine/streams/targets.py", "masked | (inside & ~", "masked | (~", "engine/streams/shift"),
    Mutant("nitp_ops/engine/streams/targets.py", ".masked_fill(~valid_pairs(streams, k), fill)", "", "engine/streams/label_layout"),
    Mutant("nitp_ops/engine/streams/targets.py", ".masked_fill(~pairs, 1.0)", "", "engine/streams/label_layout"),
    Mutant("nitp_ops/engine/streams/document_ids.py", "positions[:, :-1] + 1", "positions[:, :-1]", "engine/streams/shift"),
    Mutant("nitp_ops/engine/window.py", '== "sum" else self', '== "mean" else self', "distributed/objectives/objectives"),
    Mutant("nitp_ops/engine/weighting.py", "max(count.item(), 1)", "count.item()", "objectives/properties"),
    Mutant("nitp_ops/engine/weighting.py", "count.clamp(min=1)", "count", "engine/shortcuts"),
    Mutant("nitp_ops/engine/composite.py", "torch.where(coefficients[name] == 0, 0, part.loss)", "part.loss",
           "engine/plan"),
    Mutant("nitp_ops/engine/weighting.py", "torch.where(alive, gradients[0], 0)", "gradients[0]", "objectives/properties"),
    Mutant("nitp_ops/engine/head_terms.py", "self.term == other.term and ", "", "objectives/tokens/mtp_shared engine/plan"),
    Mutant("nitp_ops/engine/head_terms.py", "torch.where(present, loud, 0)", "present.to(loud.dtype)", "engine/sets"),
    Mutant("nitp_ops/engine/head_terms.py", "(1 - self.rows.label_smoothing) * (", "(", "objectives/tokens/mtp_shared"),
    # the objectives
    Mutant("objectives/latent/nitp.py", "* info.num_layers + 0.75", "* info.num_layers", "engine/spec/build"),
    Mutant("objectives/latent/nitp.py", "            shift = self.shift", "            z, shift = z.detach(), self.shift",
           "objectives/latent/nitp_stop_gradient"),
    Mutant("objectives/latent/nitp.py", "z[:, shift:]", "z[:, :pairs]", "objectives/values"),
    Mutant("nitp_ops/engine/skill.py", "math.nan, 1 - loss / floor", "math.nan, loss / floor",
           "objectives/latent/nitp_floor engine/metrics"),
    Mutant("nitp_ops/engine/skill.py", "begin + shift : end + shift", "begin : end", "objectives/latent/nitp_floor engine/metrics"),
    Mutant("objectives/tokens/mtp_sequential.py", "return 1 / self.depth", "return 1.0", "objectives/tokens/mtp_sequential"),
    Mutant("objectives/tokens/mtp_sequential.py", "normed if self.normed", "state if self.normed",
           "objectives/tokens/mtp_sequential"),
    Mutant("objectives/tokens/mtp_shared.py", "self.weights[self.offsets.index(int(part))]", "self.weights[0]",
           "objectives/tokens/mtp_shared"),
    Mutant("nitp_ops/engine/modules/projector.py", "return gate_up, down", "return gate_up.flip(0), down",
           "objectives/values"),
    Mutant("objectives/tokens/mtp_parallel.py", "streams, f, k)", "streams, f, 1)", "objectives/tokens/mtp_parallel"),
    Mutant("objectives/tokens/top.py", "self.window + 1 - k", "k - 1", "objectives/tokens/top"),
    Mutant("objectives/regularizers/cosine_regularizer.py", "- unit.square().sum()", "", "objectives/regularizers/cosine_regularizer"),
    Mutant("objectives/latent/nextlat.py", "log_p.exp() - q", "q - log_p.exp()", "objectives/latent/nextlat"),
    Mutant("objectives/latent/fsp_bow.py", "scatter_add_(1, bag, -counted)", "scatter_add_(1, bag, counted)",
           "objectives/latent/fsp_bow"),
    Mutant("objectives/tokens/ntp.py", "replace(rows, class_weight=", "replace(rows, token_weight=",
           "objectives/class_weight"),
    Mutant("nitp_ops/engine/spec/schedule.py", "torch.where(step >= begin", "torch.where(step > begin", "engine/spec/schedule"),
    Mutant("nitp_ops/engine/metrics.py", 'own["weighted"] / own', 'own["loss"] / own', "engine/metrics"),
    Mutant("nitp_ops/engine/counts.py", "self[part] + other[part]", "other[part]", "objectives/properties"),
    # drafting and decoding
    Mutant("nitp_ops/engine/drafting/decoding.py", "== drafts).cumprod(0)", "== drafts)", "engine/draft"),
    Mutant("nitp_ops/engine/drafting/drafters.py", "max(0, same - k)", "max(0, same)", "engine/draft"),
    Mutant("nitp_ops/engine/modules/blocks.py", ".unsqueeze(-1) >= place\n        return", ".unsqueeze(-1) > -1\n        return",
           "engine/draft"),
    Mutant("experiments/train/model.py", "self.cosine[start:stop]", "self.cosine[: stop - start]", "experiments/draft"),
)  # fmt: skip
