"""The edits of tests/mutants/run.py in kernels and in the ops around them."""

from __future__ import annotations

from tests.mutants.table import mutants

MUTANTS = mutants(
    {
        "csrc/formulas/cross_entropy.h": (
            # what a row's loss and gradient are
            (
                "weight_sum + A(2) * z_loss * lse",
                "weight_sum + z_loss * lse",
                "kernels/cuda_source/operators",
            ),
            (
                "quotient(z, cap) * quotient(z, cap)) : scale",
                "quotient(z, cap)) : scale",
                "kernels/cuda_source/operators",
            ),
        ),
        "csrc/formulas/alignment.h": (
            ("1 / (p * z))) : A(0)", "1 / p)) : A(0)", "kernels/cuda_source/rows"),
            # rows whose squares overflow
            ("sum_of_squares > A(most)", "sum_of_squares < A(0)", "kernels/cuda_source/rows"),
        ),
        "csrc/formulas/swiglu.h": (
            ("A(1) + g * (A(1) - s)", "A(1) + g * s", "kernels/cuda_source/rows"),
        ),
        "csrc/cuda/reduce.h": (
            # every meeting of the threads of a row: of the warps of a block, of the blocks of a cluster, of a warp before it
            # writes the targets over what it wrote; what rounding leaves out of the exponent
            (
                "__syncthreads();\n  return warp_merge",
                "return warp_merge",
                "kernels/cuda_source/clusters",
            ),
            ("    inboxes_are_open();\n", "", "kernels/cuda_source/clusters"),
            ("    await_messages(mail);\n", "", "kernels/cuda_source/clusters"),
        ),
        "csrc/cuda/cross_entropy/cross_entropy.cu": (
            ("  __syncwarp();\n", "", "kernels/cuda_source/clusters"),
            (
                "if (f.own_weight != A(0)) f.gap += f.own_weight * (row.unit * raised);",
                "",
                "kernels/cuda_source/clusters",
            ),
            ("  wait_for_copies();\n", "", "kernels/cuda_source/clusters"),
            ("absent && !a.softmax_partials ? -1 : best", "best", "kernels/cuda_source/labels"),
        ),
        "csrc/cuda/cross_entropy/exponential.h": (
            ("return exp2_of(-residual);", "return 1.0f;", "kernels/cuda_source/extremes"),
            ("rate = base_rate = without_fraction(base_rate);", "", "kernels/cuda_source/extremes"),
        ),
        "csrc/cuda/cross_entropy/row.h": (
            ("return half_tanh(", "return gradient_tanh<T>(", "kernels/cuda_source/extremes"),
            (" || (W == 1 && top == s.max && j < s.first)", "", "kernels/cuda_source/operators"),
        ),
        "csrc/cuda/launch.h": (
            ("entry = latest_ = new Entry", "entry = new Entry", "kernels/cuda_source/geometry"),
        ),
        "nitp_ops/kernels/triton/swiglu.py": (
            ("(1 + g * (1 - s))", "(1 + g * s)", "kernels/triton_source/kernels"),
        ),
        "nitp_ops/ops/cross_entropy/head_pass.py": (
            # the chunked algorithms
            (
                "self.logits.sum(0, dtype=accumulator.dtype)",
                "self.logits[0]",
                "ops/cross_entropy/linear_cross_entropy",
            ),
            (
                "with_zeros(hidden[:count].masked_fill(chunk.inactive, 0), padded)",
                "hidden",
                "ops/cross_entropy/inactive_and_absent_rows engine/plan",
            ),
            ("logits[count:].zero_()", "pass", "core/even_rows"),
            (
                "width), dtype=policy.out_dtype",
                "width), dtype=policy.dtype",
                "ops/cross_entropy/shared_pass",
            ),
            ("self.rounded[:padded].copy_(logits)", "self.rounded[:padded]", "core/gemm_policy"),
            # what weighs nothing reaches nothing
            (
                "x if self.inactive is None else x.masked_fill_(self.inactive, 0)",
                "x",
                "ops/inactive_rows",
            ),
        ),
        "nitp_ops/ops/cross_entropy/chunked.py": (
            (
                "= sum(each.may_be_active for each in of_terms) > 1",
                "= len(of_terms) > 1",
                "ops/numerics",
            ),
            (
                "in active if call.want_hidden[place]]",
                "in active]",
                "ops/cross_entropy/shared_pass",
            ),
        ),
        "nitp_ops/core/chunking.py": (
            ("if longest is not None:  # no more", "if False:  # no more", "ops/chunk_sizes"),
            ("block.nbytes > _MAPPED_BYTES", "block.nbytes < 0", "core/workspace"),
            ("-(-columns // _ALIGNED) * _ALIGNED", "columns", "core/gemm_policy"),
            ("rows - len(chunk)))", "rows - len(chunk)), 1)", "core/even_rows"),
        ),
        "nitp_ops/core/weight_gradient.py": (
            ("gradient[end - len(part) : end]", "gradient[: len(part)]", "ops/numerics"),
            ("first += len(part)", "first += 0", "ops/numerics"),
        ),
        "nitp_ops/core/gemm.py": (
            ("numbers < SPLIT_NUMBERS", "numbers < 0", "core/gemm_policy"),
            ("out.float() if add else", "out.float() if False else", "core/gemm_policy"),
        ),
        "nitp_ops/ops/cross_entropy/vocab_shard.py": (
            ("async_op=self.overlap", "async_op=True", "distributed/ops/vocab_parallel"),
            ('(fraction * fields["sum"])', 'fields["sum"]', "distributed/ops/vocab_parallel"),
            (
                "gap = (top - peak) * fields",
                "gap = 0 * fields",
                "distributed/ops/vocab_parallel",
            ),
            ("(best + self.first).to(bits)", "best.to(bits)", "distributed/ops/vocab_parallel"),
        ),
        "nitp_ops/ops/chunk_plan.py": (
            (
                "pad_to_alignment(min(together, step), torch.device(device), dtype)",
                "min(together, step)",
                "core/even_rows",
            ),
        ),
        "nitp_ops/ops/cross_entropy/labelled_rows.py": (
            (
                "(given & (rows.labels >= 0) if several else",
                "(given if several else",
                "ops/cross_entropy/token_semantics",
            ),
        ),
        "nitp_ops/kernels/torch_rows/prepare.py": (
            # what labels say, before the chunks and after them
            ("torch.where(total == 0, 1, total)", "total", "kernels/labelled_rows"),
            (
                "torch.where(scale == 0, 0, scale / divisor.view(()))",
                "scale / divisor.view(())",
                "kernels/labelled_rows",
            ),
            (
                "torch.where(present, weight[:, 0], 0).to(sum_dtype(labels.device))",
                "present",
                "kernels/labelled_rows ops/cross_entropy/token_semantics",
            ),
            ("row_weight.view(-1)", "row_weight", "kernels/labelled_rows"),
            ("((weight != 0) & given)", "given", "ops/inactive_rows kernels/labelled_rows"),
        ),
        "nitp_ops/kernels/torch_rows/cross_entropy.py": (
            ("else best.masked_fill(~active, -1)", "else best", "kernels/labelled_rows"),
        ),
        "csrc/formulas/labels.h": (
            ("a.mean && count != 0.0", "a.mean", "kernels/cuda_source/labels"),
            ("a.scale[row] == A(0) ? 0.0 :", "", "kernels/cuda_source/labels"),
            ("a.target_weight[k] != A(0)", "true", "kernels/cuda_source/labels"),
        ),
        "csrc/cuda/prepare.cu": (
            ("first += kAtOnce * kAdders", "first += kAdders", "kernels/cuda_source/labels"),
        ),
        "nitp_ops/kernels/triton/prepare.py": (
            ("too_many & has, float", "too_many, float", "kernels/triton_source/labels"),
        ),
        "nitp_ops/kernels/triton/cross_entropy.py": (
            ("best = tl.where(present > 0, best, -1)", "pass", "kernels/triton_source/labels"),
            # rows of logits under Triton, and where the vocabulary or the sequence is sharded
            (
                "tl.where(step > 0, first, found)",
                "tl.where(step >= 0, first, found)",
                "kernels/triton_source/cross_entropy",
            ),
            (
                "lane_shifted -= tl.where(step > 0, lane_weight * step, 0.0)",
                "lane_shifted -= 0.0",
                "kernels/triton_source/cross_entropy",
            ),
        ),
        "nitp_ops/ops/implicit_token/chunked.py": (
            (
                "slice(part.start + shift, part.stop + shift)",
                "part",
                "ops/implicit_token/implicit_token_loss",
            ),
            (
                "(part + shift).clamp_",
                "(part + shift - 1).clamp_",
                "ops/implicit_token/implicit_token_loss",
            ),
            ("d_h.masked_fill_(~pairs.keep[part].unsqueeze(1), 0)", "pass", "ops/inactive_rows"),
        ),
        "nitp_ops/ops/gradients.py": (
            (
                "recompute() if self.gradients is None else",
                "[] if False else",
                "ops/cross_entropy/linear_cross_entropy",
            ),
            (
                "upstream.to(reference.working(gradient)), _rows(out)",
                "torch.ones_like(upstream).to(reference.working(gradient)), _rows(out)",
                "ops/op_laws",
            ),
            (
                "upstream.to(buffer.dtype)",
                "torch.ones_like(upstream).to(buffer.dtype)",
                "ops/cross_entropy/token_semantics",
            ),
        ),
        "nitp_ops/core/checks.py": (
            ("return guard_scalar(value)", "return value", "ops/compiled_options"),
        ),
        "nitp_ops/kernels/triton/alignment.py": (
            ("square > most, shrink", "square > most, 1.0", "kernels/triton_source/kernels"),
        ),
        "nitp_ops/kernels/triton/cross_entropy_gradient.py": (
            ("(1 - ratio * ratio)", "(1 - ratio)", "kernels/cuda_source/shard_rows"),
        ),
        "nitp_ops/kernels/triton/scale.py": (
            ("tl.where(by == 0, 0.0, scaled)", "scaled", "kernels/triton_source/kernels"),
        ),
        "nitp_ops/ops/cross_entropy/sharded/sequence_rows.py": (
            (
                "dist.get_rank(group) * count, count",
                "0, count",
                "distributed/ops/sequence_parallel",
            ),
        ),
    }
)
