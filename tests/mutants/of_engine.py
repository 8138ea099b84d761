"""The edits of tests/mutants/run.py in what all objectives share: spec, plan, counts, metrics, schedules, drafting."""

from __future__ import annotations

from tests.mutants.table import mutants

MUTANTS = mutants(
    {
        "nitp_ops/engine/plan/weighting.py": (
            (" * part.term.part_weight(part.key)", "", "objectives/tokens/mtp_sequential"),
            (
                "weight * loss if weight else torch.zeros_like(loss)",
                "weight * loss",
                "engine/metrics",
            ),
        ),
        "nitp_ops/engine/composite.py": (
            ("window.counts is None and ", "", "engine/shortcuts"),
            ("(p.dim() == 2) == matrices]", "True]", "engine/spec/build"),
        ),
        "nitp_ops/engine/plan/stream_use.py": (
            ("if always_active(term) or not names:", "if True:", "objectives/properties"),
            ("readers.count(name) > 1", "readers.count(name) > 2", "engine/plan"),
        ),
        "nitp_ops/engine/metrics.py": (
            ('["denominator"].clamp(min=1)', '["denominator"]', "engine/metrics"),
            ('rows = own["count"].clamp(min=1)', 'rows = own["count"]', "engine/metrics"),
        ),
        "nitp_ops/engine/counts.py": (
            ("if self.group_size != other.group_size:", "if False:", "engine/metrics"),
        ),
        "nitp_ops/engine/window.py": (
            ('or self.gradient_reduction == "sum"', "", "engine/accumulation"),
            ("counts.group_size % ranks", "counts.group_size > ranks", "engine/accumulation"),
        ),
        "nitp_ops/engine/streams/needs.py": (
            ("need.grad or before.grad", "need.grad", "engine/streams/needs"),
        ),
        "objectives/latent/nitp.py": (
            (
                "grad=not self.stop_gradient",
                "grad=True",
                "objectives/properties engine/streams/needs",
            ),
        ),
        "nitp_ops/engine/plan/head_passes.py": (
            ("softcap=info.softcap", "softcap=None", "objectives/tokens/top"),
            ("logit_scale=info.logit_scale", "logit_scale=1.0", "objectives/tokens/top"),
            (
                "id(head), _HeadUsers(head, [], {})).parts",
                "0, _HeadUsers(head, [], {})).parts",
                "engine/sets",
            ),
        ),
        "nitp_ops/engine/plan/head_terms.py": (
            ("torch.where((weight == 0) | absent, 0, weighted)", "weighted", "engine/metrics"),
            ("if self.ignore_index == -1:", "if False:", "engine/shortcuts"),
            ("(labels < 0) & (labels != ignore_index)", "labels > labels", "engine/plan"),
        ),
        "nitp_ops/engine/streams/streams.py": (
            ("other.formed = {}", "self.formed = other.formed = {}", "engine/shortcuts"),
        ),
        "nitp_ops/engine/modules/logit_losses.py": (
            ("(dz if slope is None else dz.mul_(slope))", "dz", "objectives/latent/fsp_bow"),
            (".mul_(info.logit_scale)", "", "objectives/latent/fsp_bow"),
            ("d_weight += torch.mm", "d_weight = torch.mm", "objectives/latent/fsp_bow"),
        ),
        "objectives/latent/fsp_bow.py": (
            ("threshold=40", "threshold=20", "objectives/latent/fsp_bow"),
        ),
        "nitp_ops/engine/modules/parameters.py": (
            (
                "torch.default_generator.manual_seed(seed)",
                "torch.default_generator.manual_seed(0)",
                "engine/blocks engine/spec/build",
            ),
            ("manual_seed(self.seed)", "manual_seed(0)", "engine/spec/build"),
        ),
        "nitp_ops/engine/modules/module_call.py": (
            ("        if own is not None:\n            module.forward = own", "", "engine/heads"),
            (
                "or nn_module._global_forward_hooks",
                "or module._forward_hooks",
                "engine/heads engine/spec/build",
            ),
        ),
        "nitp_ops/engine/modules/head_access.py": (
            ("if not weight.is_leaf:", "if False:", "engine/heads engine/spec/build"),
        ),
        "nitp_ops/engine/parsing.py": (
            ("or k < length:", "or k <= length:", "engine/spec/spec"),
            (
                "named[:index] + named[index + 1 :]",
                "named[:index]",
                "objectives/tokens/mtp_parallel",
            ),
        ),
        "nitp_ops/engine/spec/validation.py": (
            ("-(2**63) <= value < 2**63", "-(2**63) <= value", "engine/spec/spec_fuzz"),
        ),
        "nitp_ops/engine/spec/grammar.py": (
            ("self.depth == _DEEPEST", "False", "engine/spec/spec_fuzz"),
        ),
        "nitp_ops/engine/registry.py": (
            ("    except KeyboardInterrupt:\n        raise\n", "", "engine/spec/plugin_fails"),
            (
                "_built_in.get(name) or _plugins().get(name)",
                "_plugins().get(name) or _built_in.get(name)",
                "engine/spec/lazy",
            ),
            ("except BaseException", "except Exception", "engine/spec/plugin_fails"),
        ),
        "nitp_ops/engine/spec/schedule.py": (
            (
                "step >= self.begin + self.warmup",
                "step > self.begin + self.warmup",
                "engine/spec/schedule",
            ),
            ("(step - self.begin) / max", "step / max", "engine/spec/schedule"),
        ),
        "objectives/external.py": (
            ("torch.ones((), dtype", "torch.zeros((), dtype", "objectives/external"),
        ),
        "nitp_ops/engine/drafting/decoding.py": (
            ("min(limit, end - known - 1)", "limit", "engine/draft"),
            ("trunk.cut(known + right)", "trunk.cut(known + len(drafts))", "engine/draft"),
        ),
        "nitp_ops/engine/drafting/drafters.py": (
            ("block.cut(kept)", "block.cut(state.shape[1])", "engine/draft"),
        ),
        "nitp_ops/ops/cross_entropy/logits/autograd.py": (
            (
                "torch.autograd.graph.increment_version(logits)",
                "pass",
                "ops/cross_entropy/inplace_gradient",
            ),
            ("0, scale * upstream.reshape(-1))", "0, scale)", "ops/cross_entropy/cross_entropy"),
            (
                "(scale == 0) | (upstream.reshape(-1) == 0)",
                "scale == 0",
                "ops/cross_entropy/cross_entropy",
            ),
            (
                "torch.where(scale == 0, 0, scale * values.stats[0])",
                "(scale * values.stats[0])",
                "ops/cross_entropy/cross_entropy",
            ),
        ),
        "nitp_ops/core/weight_gradient.py": (
            ("(upstream != 0).to(", "(upstream == upstream).to(", "core/weight_gemm"),
            ("torch.where(upstream == 0, 0, b * upstream)", "(b * upstream)", "core/weight_gemm"),
        ),
        "nitp_ops/ops/cross_entropy/chunked.py": (
            ("len(chunks) != 1 or", "len(chunks) < 1 or", "core/weight_gemm"),
            ("held <= buffer.nbytes and", "", "core/weight_gemm"),
        ),
        "nitp_ops/ops/cross_entropy/autograd.py": (
            ("call._replace(want_weight=False)", "call", "core/weight_gemm"),
        ),
        "nitp_ops/core/dispatch.py": (
            (" or tensor.is_meta)", ")", "core/dispatch ops/meta_device"),
        ),
    }
)
