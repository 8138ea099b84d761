"""The edits of tests/mutants/run.py in the CPU's row kernels, for which the library is built anew."""

from __future__ import annotations

from tests.mutants.table import mutants

MUTANTS = mutants(
    {
        "csrc/cpu/alignment.cpp": (
            (
                "if (a.gradient && !active) {",
                "if (false) {",
                "ops/alignment_and_swiglu ops/implicit_token/implicit_token_loss",
            ),
            ("put(pair.dz + j, -g)", "put(pair.dz + j, g)", "ops/alignment_and_swiglu"),
            ("(q, log_ratio(j) - kl)", "(q, log_ratio(j))", "ops/alignment_and_swiglu"),
            (
                "(a.target_rows ? a.target_rows[i] : i)",
                "i",
                "ops/implicit_token/implicit_token_loss",
            ),
            ("by.p * p[j]);", "p[j]);", "ops/large_values"),
            ("if (!Far && kl != kl)", "if (false)", "ops/large_values"),
        ),
        "csrc/cpu/cross_entropy.cpp": (
            (
                "p > A(0) ? p * drop : A(0)",
                "p * drop",
                "ops/cross_entropy/inactive_and_absent_rows ops/cross_entropy/extreme_logits",
            ),
            ("if (weight_sum != 0)", "if (false)", "kernels/instruction_sets"),
            (
                "if (block_max > row.max) {",
                "if (block_max >= row.max) {",
                "kernels/instruction_sets::test_the_prediction_is_the_first_of_equal_maxima",
            ),
            (
                "best < n ? best_block + best : 0",
                "best_block + best",
                "kernels/instruction_sets::test_the_prediction_is_the_first_of_equal_maxima",
            ),
            ("  targets.merge();\n", "", "ops/cross_entropy/token_semantics"),
            (
                "absent && !a.softmax_partials ? -1 : row.argmax",
                "row.argmax",
                "kernels/labelled_rows",
            ),
        ),
        "csrc/cpu/cross_entropy_gradient.cpp": (
            (
                "if (row.is_zero()) {",
                "if (false) {",
                "distributed/ops/vocab_parallel kernels/shard_rows",
            ),
            ("    targets.merge();\n", "", "kernels/shard_rows"),
        ),
        "csrc/cpu/prepare.cpp": (
            ("if (end - begin > 128) {", "if (false) {", "kernels/labelled_rows"),
            ("if (outside < 0) outside", "outside", "kernels/labelled_rows"),
            ("too_many && read_labels(a, row).present", "too_many", "kernels/labelled_rows"),
        ),
        "csrc/cpu/accumulate.cpp": (
            ("sum[j] += factor", "sum[j] = factor", "ops/numerics ops/cross_entropy/shared_pass"),
            ("if (factor == A(0)) return;", "", "ops/inactive_rows"),
        ),
        "csrc/cpu/scale.cpp": (("if (factor == A(0)) {", "if (false) {", "ops/inactive_rows"),),
        "csrc/cpu/simd_loops.h": (
            ("sum = sum + at.only(body(at))", "sum = sum + body(at)", "kernels/instruction_sets"),
        ),
        "csrc/cpu/swiglu.cpp": (
            (
                "at.store(d_up, gradient.up)",
                "at.store(d_up, gradient.gate)",
                "ops/alignment_and_swiglu",
            ),
        ),
        "csrc/cpu/gemm/gemm.cpp": (
            ("g.add || from > 0", "g.add", "core/gemm::test_more_than_one_cell_or_part_a_thread"),
            (
                "from > 0, false, prefetcher",
                "false, false, prefetcher",
                "core/gemm::test_more_than_one_cell_or_part_a_thread",
            ),
            (
                "sizeof(O) < 4 && depth.cut()",
                "false",
                "core/gemm::test_more_than_one_cell_or_part_a_thread",
            ),
        ),
    }
)
