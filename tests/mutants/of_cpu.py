"""The edits of tests/mutants/run.py in the CPU's row kernels, for which the library is built anew."""

from __future__ import annotations

from tests.mutants.of_objectives import Mutant

ALIGNMENT, CROSS_ENTROPY = "csrc/cpu/alignment.cpp", "csrc/cpu/cross_entropy.cpp"
LOSSES = "ops/cross_entropy/linear_cross_entropy ops/cross_entropy/token_semantics"
FIRST = "kernels/instruction_sets::test_the_prediction_is_the_first_of_equal_maxima"
GRADIENT = "csrc/cpu/cross_entropy_gradient.cpp"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(ALIGNMENT, "if (a.gradient && !active) {", "if (false) {", "ops/alignment_and_swiglu ops/implicit_token_loss"),
    Mutant(ALIGNMENT, "put(pair.dz + j, -g)", "put(pair.dz + j, g)", "ops/alignment_and_swiglu"),
    Mutant(ALIGNMENT, "(q, log_ratio(j) - kl)", "(q, log_ratio(j))", "ops/alignment_and_swiglu"),
    Mutant(ALIGNMENT, "(a.target_rows ? a.target_rows[i] : i)", "i", "ops/implicit_token_loss"),
    Mutant(CROSS_ENTROPY, "p > A(0) ? p * drop : A(0)", "p * drop", LOSSES),
    Mutant(CROSS_ENTROPY, "if (weight_sum != 0)", "if (false)", "kernels/instruction_sets"),
    Mutant(CROSS_ENTROPY, "if (block_max > row.max) {", "if (block_max >= row.max) {", FIRST),
    Mutant(CROSS_ENTROPY, "best < n ? best_block + best : 0", "best_block + best", FIRST),
    Mutant(CROSS_ENTROPY, "  targets.merge();\n", "", "ops/cross_entropy/token_semantics"),
    Mutant(GRADIENT, "if (row.is_zero()) {", "if (false) {", "distributed/ops/vocab_parallel kernels/shard_rows"),
    Mutant(GRADIENT, "    targets.merge();\n", "", "kernels/shard_rows"),
    Mutant(CROSS_ENTROPY, "absent && !a.softmax_partials ? -1 : row.argmax", "row.argmax",
           "kernels/labelled_rows"),
    Mutant("csrc/cpu/prepare.cpp", "if (end - begin > 128) {", "if (false) {", "kernels/labelled_rows"),
    Mutant("csrc/cpu/prepare.cpp", "if (outside < 0) outside", "outside", "kernels/labelled_rows"),
    Mutant("csrc/cpu/prepare.cpp", "too_many && read_labels(a, row).present", "too_many", "kernels/labelled_rows"),
    Mutant("csrc/cpu/accumulate.cpp", "sum[j] += factor", "sum[j] = factor", "ops/numerics ops/cross_entropy/shared_pass"),
    Mutant("csrc/cpu/accumulate.cpp", "if (factor == A(0)) return;", "", "ops/inactive_rows"),
    Mutant("csrc/cpu/scale.cpp", "if (factor == A(0)) {", "if (false) {", "ops/inactive_rows"),
    Mutant(ALIGNMENT, "by.p * p[j]);", "p[j]);", "ops/large_values"),
    Mutant(ALIGNMENT, "if (!Far && kl != kl)", "if (false)", "ops/large_values"),
    Mutant("csrc/cpu/simd_loops.h", "sum = sum + at.only(body(at))", "sum = sum + body(at)", "kernels/instruction_sets"),
    Mutant("csrc/cpu/swiglu.cpp", "at.store(d_up, gradient.up)", "at.store(d_up, gradient.gate)",
           "ops/alignment_and_swiglu"),
    Mutant("csrc/cpu/gemm/gemm.cpp", "g.add || from > 0", "g.add", "core/gemm::test_more_than_one_cell_or_part_a_thread"),
    Mutant("csrc/cpu/gemm/gemm.cpp", "from > 0, false, prefetcher", "false, false, prefetcher",
           "core/gemm::test_more_than_one_cell_or_part_a_thread"),
    Mutant("csrc/cpu/gemm/gemm.cpp", "sizeof(O) < 4 && depth.cut()", "false",
           "core/gemm::test_more_than_one_cell_or_part_a_thread"),
)  # fmt: skip
