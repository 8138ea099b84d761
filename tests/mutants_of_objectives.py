"""The edits of tests/mutants.py in the ops' kernels, chunked algorithms and objectives, and the tests that must die."""

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
           "cuda_source"),
    Mutant(
        "csrc/formulas/cross_entropy.h",
        "quotient(z, cap) * quotient(z, cap)) : scale",
        "quotient(z, cap)) : scale",
        "cuda_source",
    ),
    Mutant("csrc/formulas/alignment.h", "1 / (p * z))) : A(0)", "1 / p)) : A(0)", "cuda_source_rows"),
    Mutant("csrc/formulas/swiglu.h", "A(1) + g * (A(1) - s)", "A(1) + g * s", "cuda_source_rows"),
    # every meeting of the threads of a row: of the warps of a block, of the blocks of a cluster, of a warp before it
    # writes the targets over what it wrote; what rounding leaves out of the exponent
    Mutant("csrc/cuda/reduce.h", "__syncthreads();\n  return warp_merge", "return warp_merge", "cuda_source_clusters"),
    Mutant("csrc/cuda/reduce.h", "    inboxes_are_open();\n", "", "cuda_source_clusters"),
    Mutant("csrc/cuda/reduce.h", "    await_messages(mail);\n", "", "cuda_source_clusters"),
    Mutant("csrc/cuda/cross_entropy/cross_entropy.cu", "  __syncwarp();\n", "", "cuda_source_clusters"),
    Mutant(
        "csrc/cuda/cross_entropy/cross_entropy.cu",
        "if (f.own_weight != A(0)) f.gap += f.own_weight * (row.unit * raised);",
        "",
        "cuda_source_clusters",
    ),
    Mutant("csrc/cuda/cross_entropy/exponential.h", "return exp2_of(-residual);", "return 1.0f;",
           "cuda_source_extremes"),
    Mutant("csrc/cuda/cross_entropy/exponential.h", "rate = base_rate = without_fraction(base_rate);", "",
           "cuda_source_extremes"),
    Mutant("csrc/cuda/cross_entropy/row.h", "return half_tanh(", "return gradient_tanh<T>(", "cuda_source_extremes"),
    Mutant("csrc/cuda/cross_entropy/row.h", " || (W == 1 && top == s.max && j < s.first)", "", "cuda_source"),
    Mutant(
        "csrc/cuda/launch.h",
        "entry = latest_ = new Entry",
        "entry = new Entry",
        "cuda_source_geometry",
    ),
    Mutant("csrc/cuda/cross_entropy/cross_entropy.cu", "  wait_for_copies();\n", "", "cuda_source_clusters"),
    Mutant("nitp_ops/kernels/triton/swiglu.py", "(1 + g * (1 - s))", "(1 + g * s)", "triton_kernels"),
    # the chunked algorithms
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "self.logits.sum(0, dtype=accumulator.dtype)", "self.logits[0]",
           "linear_cross_entropy"),
    Mutant(
        "nitp_ops/ops/cross_entropy/head_pass.py",
        "with_zeros(hidden[:count].masked_fill(chunk.inactive, 0), padded)",
        "hidden",
        "linear_cross_entropy token_semantics objectives_plan",
    ),
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "logits[count:].zero_()", "pass", "even_rows"),
    Mutant("nitp_ops/ops/cross_entropy/chunked.py", "= sum(each.may_be_active for each in of_terms) > 1", "= len(of_terms) > 1",
           "numerics"),
    Mutant("nitp_ops/ops/cross_entropy/chunked.py", "if call.want_hidden[place] == wanted]", "if wanted]", "shared_pass"),
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "width), dtype=policy.out_dtype", "width), dtype=policy.dtype", "shared_pass"),
    Mutant("nitp_ops/core/chunking.py", "if longest is not None:  # no more", "if False:  # no more", "numerics"),
    Mutant("nitp_ops/core/chunking.py", "block.nbytes > _MAPPED_BYTES", "block.nbytes < 0", "workspace"),
    Mutant("nitp_ops/core/gemm.py", "gradient[end - len(piece) : end]", "gradient[: len(piece)]", "numerics"),
    Mutant("nitp_ops/core/gemm.py", "first += len(piece)", "first += 0", "numerics"),
    Mutant("nitp_ops/core/gemm.py", "numbers < SPLIT_NUMBERS", "numbers < 0", "gemm_policy"),
    Mutant("nitp_ops/core/gemm.py", "out.float() if add else", "out.float() if False else", "gemm_policy"),
    Mutant("nitp_ops/core/chunking.py", "-(-columns // _ALIGNED) * _ALIGNED", "columns", "gemm_policy"),
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "self.rounded[:padded].copy_(logits)", "self.rounded[:padded]", "gemm_policy"),
    Mutant("nitp_ops/ops/cross_entropy/vocab_shard.py", "async_op=self.overlap", "async_op=True", "vocab_parallel"),
    Mutant(
        "nitp_ops/ops/chunk_plan.py",
        "pad_to_alignment(min(together, step), torch.device(device), dtype)",
        "min(together, step)",
        "even_rows",
    ),
    Mutant("nitp_ops/core/chunking.py", "rows - len(chunk)))", "rows - len(chunk)), 1)", "even_rows"),
    Mutant("nitp_ops/ops/cross_entropy/labelled_rows.py", "(given & (rows.labels >= 0) if several else", "(given if several else",
           "token_semantics"),
    # what labels say, before the chunks and after them
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "torch.where(total == 0, 1, total)", "total", "labelled_rows"),
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "torch.where(scale == 0, 0, scale / divisor.view(()))",
           "scale / divisor.view(())", "labelled_rows"),
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "torch.where(present, weight[:, 0], 0).to(sum_dtype(labels.device))",
           "present", "labelled_rows token_semantics"),
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "row_weight.view(-1)", "row_weight", "labelled_rows"),
    Mutant("nitp_ops/kernels/torch_rows/cross_entropy.py", "else best.masked_fill(~active, -1)", "else best", "labelled_rows"),
    Mutant("csrc/formulas/labels.h", "a.mean && count != 0.0", "a.mean", "cuda_source_labels"),
    Mutant("csrc/formulas/labels.h", "a.scale[row] == A(0) ? 0.0 :", "", "cuda_source_labels"),
    Mutant("csrc/cuda/prepare.cu", "first += kAtOnce * kAdders", "first += kAdders", "cuda_source_labels"),
    Mutant("csrc/cuda/cross_entropy/cross_entropy.cu", "absent && !a.softmax_partials ? -1 : best", "best",
           "cuda_source_labels"),
    Mutant("nitp_ops/kernels/triton/prepare.py", "too_many & has, float", "too_many, float", "triton_labels"),
    Mutant("nitp_ops/kernels/triton/cross_entropy.py", "best = tl.where(present > 0, best, -1)", "pass", "triton_labels"),
    Mutant(
        "nitp_ops/ops/implicit_token/chunked.py", "slice(part.start + shift, part.stop + shift)", "part", "implicit_token_loss"
    ),
    Mutant("nitp_ops/ops/implicit_token/chunked.py", "(part + shift).clamp_", "(part + shift - 1).clamp_", "implicit_token_loss"),
    Mutant("nitp_ops/ops/gradients.py", "recompute() if self.gradients is None else", "[] if False else",
           "linear_cross_entropy"),
    Mutant("nitp_ops/ops/gradients.py", "upstream.to(reference.working(gradient)), _rows(out)",
           "torch.ones_like(upstream).to(reference.working(gradient)), _rows(out)", "op_laws"),
    Mutant("nitp_ops/ops/gradients.py", "upstream.to(buffer.dtype)", "torch.ones_like(upstream).to(buffer.dtype)",
           "token_semantics"),
    # what weighs nothing reaches nothing
    Mutant("nitp_ops/ops/cross_entropy/head_pass.py", "x if self.inactive is None else x.masked_fill_(self.inactive, 0)", "x",
           "inactive_rows"),
    Mutant("nitp_ops/kernels/torch_rows/prepare.py", "((weight != 0) & given)", "given", "inactive_rows labelled_rows"),
    Mutant("csrc/formulas/labels.h", "a.target_weight[k] != A(0)", "true", "cuda_source_labels"),
    Mutant("nitp_ops/ops/implicit_token/chunked.py", "d_h.masked_fill_(~pairs.keep[part].unsqueeze(1), 0)", "pass",
           "inactive_rows"),
    Mutant("nitp_ops/core/checks.py", "return guard_scalar(value)", "return value", "compiled_options"),
    Mutant("objectives/latent/nitp.py", "z = z.masked_fill(~targets.unsqueeze(-1), 0)", "pass", "objectives_padding"),
    # rows whose squares overflow
    Mutant("csrc/formulas/alignment.h", "sum_of_squares > A(most)", "sum_of_squares < A(0)", "cuda_source_rows"),
    Mutant("nitp_ops/kernels/triton/alignment.py", "square > most, shrink", "square > most, 1.0", "triton_kernels"),
    # rows of logits under Triton, and where the vocabulary or the sequence is sharded
    Mutant("nitp_ops/kernels/triton/cross_entropy.py", "tl.where(step > 0, first, found)", "tl.where(step >= 0, first, found)",
           "triton_cross_entropy"),
    Mutant("nitp_ops/kernels/triton/cross_entropy.py", "below -= tl.where(step > 0, weights * step, 0.0)", "below -= 0.0",
           "triton_cross_entropy"),
    Mutant("nitp_ops/kernels/triton/cross_entropy_gradient.py", "(1 - ratio * ratio)", "(1 - ratio)", "shard_rows_gpu_source"),
    Mutant("nitp_ops/kernels/triton/scale.py", "tl.where(by == 0, 0.0, scaled)", "scaled", "triton_kernels"),
    Mutant("nitp_ops/ops/cross_entropy/vocab_shard.py", "(fraction * fields[\"sum\"])", "fields[\"sum\"]", "vocab_parallel"),
    Mutant("nitp_ops/ops/cross_entropy/vocab_shard.py", "apart = (top - peak) * fields", "apart = 0 * fields", "vocab_parallel"),
    Mutant("nitp_ops/ops/cross_entropy/vocab_shard.py", "(best + self.first).to(bits)", "best.to(bits)", "vocab_parallel"),
    Mutant("nitp_ops/ops/cross_entropy/sharded/sequence_rows.py", "dist.get_rank(group) * count, count", "0, count", "sequence_parallel"),
    Mutant("nitp_ops/engine/streams/context_parallel.py", "(rank, 2 * ranks - 1 - rank)", "(rank, ranks + rank)",
           "objectives_footprint"),
    Mutant("nitp_ops/geometry/streaming.py", "* (n * m / (n + m))", "* (n * m / n)", "geometry"),
    # which rows count, and what divides them
    Mutant("nitp_ops/engine/streams/targets.py", "values, k, *span", "values, k - 1, *span", "objectives_shift"),
    Mutant("nitp_ops/engine/streams/targets.py", "k, streams, -1) == here) & (here >= 0)", "k, streams, -1) == here)",
           "objectives_shift objectives_properties"),
    Mutant("nitp_ops/engine/streams/targets.py", "(size - first)), fill)", "(size - first)), 0)", "objectives_shift"),
    Mutant("nitp_ops/engine/streams/targets.py", "high < vocabulary and absent", "high < vocabulary", "objectives_shortcuts"),
    Mutant("nitp_ops/engine/streams/targets.py", "self.previous[at] < place", "self.previous[at] <= place", "objectives_top"),
    Mutant("nitp_ops/engine/streams/targets.py", "(k <= self.last) &", "(k < self.last) &", "objectives_top"),
    Mutant("nitp_ops/engine/streams/targets.py", "range(first - 1)", "range(0)", "objectives_windows"),
    Mutant("nitp_ops/engine/streams/targets.py", "(coming - base)", "coming", "objectives_windows"),
    Mutant("nitp_ops/engine/streams/targets.py", "place + 1, after[:, 1:])", "after[:, 1:], after[:, 1:])", "objectives_top"),
    Mutant("objectives/tokens/top.py", "math.ceil(-math.log(", "math.ceil(-0.1 * math.log(", "objectives_windows"),
    # whose document a pre-shifted label belongs to, and where what the streams say of its token is asked
    Mutant("nitp_ops/engine/streams/targets.py", "_after_unknown(here, -1)", "torch.cat([here, here[:, -1:]], dim=1)",
           "objectives_label_layout"),
    Mutant("nitp_ops/engine/streams/targets.py", 'if streams.label_layout == "document" else ~inside', "",
           "objectives_label_layout"),
    Mutant("nitp_ops/engine/streams/targets.py", "masked | (inside & ~", "masked | (~", "objectives_shift"),
    Mutant("nitp_ops/engine/streams/targets.py", ".masked_fill(~valid_pairs(streams, k), fill)", "", "objectives_label_layout"),
    Mutant("nitp_ops/engine/streams/targets.py", ".masked_fill(~pairs, 1.0)", "", "objectives_label_layout"),
    Mutant("nitp_ops/engine/streams/document_ids.py", "positions[:, :-1] + 1", "positions[:, :-1]", "objectives_shift"),
    Mutant("nitp_ops/engine/window.py", '== "sum" else self', '== "mean" else self', "objectives_ranks"),
    Mutant("nitp_ops/engine/weighting.py", "max(count.item(), 1)", "count.item()", "objectives_properties"),
    Mutant("nitp_ops/engine/weighting.py", "count.clamp(min=1)", "count", "objectives_shortcuts"),
    Mutant("nitp_ops/engine/composite.py", "torch.where(coefficients[name] == 0, 0, part.loss)", "part.loss",
           "objectives_plan"),
    Mutant("nitp_ops/engine/weighting.py", "torch.where(alive, gradients[0], 0)", "gradients[0]", "objectives_properties"),
    Mutant("nitp_ops/engine/head_terms.py", "self.term == other.term and ", "", "objectives_mtp_shared objectives_plan"),
    Mutant("nitp_ops/engine/head_terms.py", "torch.where(present, loud, 0)", "present.to(loud.dtype)", "objectives_sets"),
    Mutant("nitp_ops/engine/head_terms.py", "(1 - self.rows.label_smoothing) * (", "(", "objectives_mtp_shared"),
    # the objectives
    Mutant("objectives/latent/nitp.py", "* info.num_layers + 0.75", "* info.num_layers", "objectives_build"),
    Mutant("objectives/latent/nitp.py", "            shift = self.shift", "            z, shift = z.detach(), self.shift",
           "nitp_stop_gradient"),
    Mutant("objectives/latent/nitp.py", "z[:, shift:]", "z[:, :pairs]", "objectives_values"),
    Mutant("nitp_ops/engine/skill.py", "math.nan, 1 - loss / floor", "math.nan, loss / floor",
           "nitp_floor objectives_metrics"),
    Mutant("nitp_ops/engine/skill.py", "begin + shift : end + shift", "begin : end", "nitp_floor objectives_metrics"),
    Mutant("objectives/tokens/mtp_sequential.py", "return 1 / self.depth", "return 1.0", "objectives_mtp_sequential"),
    Mutant("objectives/tokens/mtp_sequential.py", "normed if self.normed", "state if self.normed",
           "objectives_mtp_sequential"),
    Mutant("objectives/tokens/mtp_shared.py", "self.weights[self.offsets.index(int(part))]", "self.weights[0]",
           "objectives_mtp_shared"),
    Mutant("nitp_ops/engine/modules/projector.py", "return gate_up, down", "return gate_up.flip(0), down",
           "objectives_values"),
    Mutant("objectives/tokens/mtp_parallel.py", "streams, f, k)", "streams, f, 1)", "objectives_mtp_parallel"),
    Mutant("objectives/tokens/top.py", "self.window + 1 - k", "k - 1", "objectives_top"),
    Mutant("objectives/regularizers/cosine_regularizer.py", "- unit.square().sum()", "", "objectives_regularizers"),
    Mutant("objectives/latent/nextlat.py", "log_p.exp() - q", "q - log_p.exp()", "objectives_nextlat"),
    Mutant("objectives/latent/fsp_bow.py", "scatter_add_(1, bag, -counted)", "scatter_add_(1, bag, counted)",
           "objectives_fsp_bow"),
    Mutant("objectives/tokens/ntp.py", "replace(rows, class_weight=", "replace(rows, token_weight=",
           "objectives_class_weight"),
    Mutant("nitp_ops/engine/spec/schedule.py", "torch.where(step >= begin", "torch.where(step > begin", "objectives_schedule"),
    Mutant("nitp_ops/engine/metrics.py", 'own["weighted"] / own', 'own["loss"] / own', "objectives_metrics"),
    Mutant("nitp_ops/engine/counts.py", "self[part] + other[part]", "other[part]", "objectives_properties"),
    # drafting and decoding
    Mutant("nitp_ops/engine/drafting/decoding.py", "== drafts).cumprod(0)", "== drafts)", "objectives_draft"),
    Mutant("nitp_ops/engine/drafting/drafters.py", "max(0, same - k)", "max(0, same)", "objectives_draft"),
    Mutant("nitp_ops/engine/modules/blocks.py", ".unsqueeze(-1) >= place\n        return", ".unsqueeze(-1) > -1\n        return",
           "objectives_draft"),
    Mutant("experiments/train/model.py", "self.cosine[start:stop]", "self.cosine[: stop - start]", "pretrain_draft"),
)  # fmt: skip
