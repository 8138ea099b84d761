"""The edits of tests/mutants/run.py in what meets other people's models and trainers."""

from __future__ import annotations

from tests.mutants.table import mutants

MUTANTS = mutants(
    {
        "nitp_ops/trainers/torchtitan.py": (
            (
                "        if own is not None:\n            model.forward = own",
                "",
                "trainers/torchtitan",
            ),
            ("            model._skip_lm_head = skip", "            pass", "trainers/torchtitan"),
            ("    model.register_state_dict_post_hook(leave_out)\n", "", "trainers/torchtitan"),
            (
                'gradient_reduction="sum"',
                'gradient_reduction="mean"',
                "trainers/torchtitan::test_a_resumed_run_and_a_run_on_two_ranks_continue_like_one_process",
            ),
        ),
        "nitp_ops/trainers/torchtitan_checks.py": (
            ("depth = len(", "depth = 0 * len(", "trainers/torchtitan_families"),
            (
                "(Decoder.forward, MTPDecoder.forward)",
                "(Decoder.forward,)",
                "trainers/torchtitan_families",
            ),
        ),
        "nitp_ops/trainers/megatron.py": (
            ("self.objective.spec.main_label or next(", "next(", "trainers/megatron"),
            (
                "whole = tokens if counts is None else counts[main].to(tokens.device)",
                "whole = tokens",
                "trainers/megatron",
            ),
            ("labels.masked_fill(loss_mask == 0, -100)", "labels", "trainers/megatron"),
            (
                "if labels is None or not self.model.training:",
                "if labels is None:",
                "trainers/megatron",
            ),
            ("    if config.mtp_num_layers:\n", "    if False:\n", "trainers/megatron"),
        ),
        "nitp_ops/attaching/tapping.py": (
            ("_current_graph_task_id() != -1", "_current_graph_task_id() == -2", "attaching/tap"),
            (
                "if kind is None and not self._handed_out:",
                "if not self._handed_out:",
                "attaching/tap",
            ),
            ("            if k > count:\n", "            if k > count + 1:\n", "attaching/tap"),
            (
                "for need in self.requires if need.grad}",
                "for need in self.requires}",
                "attaching/tap",
            ),
            (
                "if name in self._differentiable else value.detach()",
                "if True else value",
                "attaching/tap",
            ),
            (
                "self._found, self._handed_out = {}, True",
                "self._handed_out = True",
                "attaching/tap",
            ),
        ),
        "nitp_ops/attaching/sidecar.py": (
            ("    if got != expected:\n", "    if False:\n", "attaching/checkpoints"),
            ("    if shapes != (there :=", "    if False and (there :=", "attaching/checkpoints"),
        ),
        "nitp_ops/trainers/requirements.py": (
            (
                "_numbers(found) < _numbers(below)",
                "_numbers(found) <= _numbers(below)",
                "trainers/packages",
            ),
        ),
        "nitp_ops/attaching/optimizers.py": (
            ("if id(parameter) not in held]", "if id(parameter) in held]", "trainers/packages"),
        ),
        "nitp_ops/attaching/batch_streams.py": (
            ('("cu_seq_lens_q", "cu_seqlens")', '("cu_seq_lens_q",)', "attaching/label_layout"),
        ),
        "nitp_ops/attaching/window_shares.py": (
            # windows without a label, lengths and scales that are read off a model
            (
                "count.clamp(min=1) * inverse",
                "count * inverse",
                "trainers/every/runs::test_a_window_without_any_label_is_zero_under_the_stock_trainer",
            ),
            (
                "torch.where(labels == 0, torch.inf, inverse)",
                "inverse",
                "trainers/every/runs::test_a_window_without_any_label_is_zero_under_the_stock_trainer",
            ),
            # windows under trainers: what is averaged, where they end, what they leave behind
            (
                "counts.batches, dtype=",
                "1, dtype=",
                "trainers/every/balance::test_a_plain_loop_with_counts_averages_it_over_the_microbatches",
            ),
        ),
        "nitp_ops/trainers/window.py": (
            (
                "/ torch.as_tensor(count).clamp(min=1)",
                "/ torch.as_tensor(count)",
                "trainers/accelerate::test_a_window_without_any_label_is_no_ntp",
            ),
            (
                "total.group_size * divisor",
                "total.group_size",
                "trainers/every/runs::test_a_second_run_of_one_trainer_logs_its_own_steps",
            ),
        ),
        "nitp_ops/engine/counts.py": (
            (
                "self.batches + other.batches",
                "self.batches",
                "trainers/every/balance::test_a_plain_loop_with_counts_averages_it_over_the_microbatches",
            ),
        ),
        "nitp_ops/trainers/transformers.py": (
            (
                "if self._step_log.drop():",
                "if False:",
                "trainers/every/runs::test_a_window_that_the_trainer_takes_no_step_for_does_not_join_the_next_one",
            ),
        ),
        "nitp_ops/trainers/accelerate.py": (
            (
                "self.accelerator.step = index",
                "pass",
                "trainers/accelerate::test_a_loop_that_is_left_inside_a_window_leaves_nothing_to_the_next_one",
            ),
        ),
        "nitp_ops/trainers/lightning.py": (
            (
                "trainer.num_training_batches - 1 - batch_idx)",
                "steps)",
                "trainers/lightning_windows::test_the_last_window_of_an_epoch_is_what_it_trains_on",
            ),
        ),
        "nitp_ops/attaching/inspection/hugging_face.py": (
            (
                'sequence_length=getattr(config, "max_position_embeddings", None)',
                "sequence_length=None",
                "attaching/inspection/structure::test_offsets_past_the_longest_sequence_of_the_config_are_refused",
            ),
        ),
        "nitp_ops/attaching/inspection/logit_settings.py": (
            ("return same_kinds and", "return", "attaching/inspection/settings"),
            ("or plain.base_model is not self._base ", "", "attaching/inspection/settings"),
            ("config is self._config and ", "", "attaching/inspection/settings"),
        ),
        "nitp_ops/attaching/inspection/logit_transform.py": (
            (
                "abs(scale - 1) < 1e-4",
                "abs(scale - 1) < 1e-1",
                "attaching/inspection/structure::test_a_scale_that_is_no_rounding_of_one_is_kept_under_a_cap",
            ),
        ),
    }
)
