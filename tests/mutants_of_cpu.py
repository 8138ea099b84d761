"""The edits of tests/mutants.py in the CPU's row kernels, for which the library is built anew."""

from __future__ import annotations

from mutants_of_objectives import Mutant

ALIGNMENT, CROSS_ENTROPY = "csrc/cpu/alignment.cpp", "csrc/cpu/cross_entropy.cpp"
LOSSES = "linear_cross_entropy token_semantics"
FIRST = "instruction_sets::test_the_prediction_is_the_first_of_equal_maxima"
GRADIENT = "csrc/cpu/cross_entropy_gradient.cpp"

MUTANTS: tuple[Mutant, ...] = (
    Mutant(ALIGNMENT, "if (a.gradient && !active) {", "if (false) {", "alignment_and_swiglu implicit_token_loss"),
    Mutant(ALIGNMENT, "put(pair.dz + j, -g)", "put(pair.dz + j, g)", "alignment_and_swiglu"),
    Mutant(ALIGNMENT, "(q, log_ratio(j) - kl)", "(q, log_ratio(j))", "alignment_and_swiglu"),
    Mutant(ALIGNMENT, "(a.target_rows ? a.target_rows[i] : i)", "i", "implicit_token_loss"),
    Mutant(CROSS_ENTROPY, "p > A(0) ? p * drop : A(0)", "p * drop", LOSSES),
    Mutant(CROSS_ENTROPY, "if (weight_sum != 0)", "if (false)", "instruction_sets"),
    Mutant(CROSS_ENTROPY, "if (block_max > row.max) {", "if (block_max >= row.max) {", FIRST),
    Mutant(CROSS_ENTROPY, "best < n ? best_block + best : 0", "best_block + best", FIRST),
    Mutant(CROSS_ENTROPY, "  targets.merge();\n", "", "token_semantics"),
    Mutant(GRADIENT, "if (row.is_zero()) {", "if (false) {", "vocab_parallel shard_rows"),
    Mutant(GRADIENT, "    targets.merge();\n", "", "shard_rows"),
    Mutant(CROSS_ENTROPY, "absent && !a.softmax_partials ? -1 : row.argmax", "row.argmax",
           "labelled_rows"),
    Mutant("csrc/cpu/prepare.cpp", "if (end - begin > 128) {", "if (false) {", "labelled_rows"),
    Mutant("csrc/cpu/prepare.cpp", "if (outside < 0) outside", "outside", "labelled_rows"),
    Mutant("csrc/cpu/prepare.cpp", "too_many && read_labels(a, row).present", "too_many", "labelled_rows"),
    Mutant("csrc/cpu/accumulate.cpp", "sum[j] += factor", "sum[j] = factor", "numerics shared_pass"),
    Mutant("csrc/cpu/accumulate.cpp", "if (factor == A(0)) return;", "", "inactive_rows"),
    Mutant("csrc/cpu/scale.cpp", "if (factor == A(0)) {", "if (false) {", "inactive_rows"),
    Mutant(ALIGNMENT, "by.p * p[j]);", "p[j]);", "large_values"),
    Mutant(ALIGNMENT, "if (!Far && kl != kl)", "if (false)", "large_values"),
    Mutant("csrc/cpu/simd_loops.h", "sum = sum + at.only(body(at))", "sum = sum + body(at)", "instruction_sets"),
    Mutant("csrc/cpu/swiglu.cpp", "at.store(d_up, gradient.up)", "at.store(d_up, gradient.gate)",
           "alignment_and_swiglu"),
    Mutant("csrc/cpu/gemm/gemm.cpp", "g.add || from > 0", "g.add", "gemm::test_more_than_one_cell_or_part_a_thread"),
    Mutant("csrc/cpu/gemm/gemm.cpp", "from > 0, false, prefetcher", "false, false, prefetcher",
           "gemm::test_more_than_one_cell_or_part_a_thread"),
    Mutant("csrc/cpu/gemm/gemm.cpp", "sizeof(O) < 4 && depth.cut()", "false",
           "gemm::test_more_than_one_cell_or_part_a_thread"),
)  # fmt: skip
