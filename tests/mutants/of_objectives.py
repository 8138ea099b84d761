"""The edits of tests/mutants/run.py in objectives and in what their rows are made of."""

from __future__ import annotations

from tests.mutants.table import mutants

MUTANTS = mutants(
    {
        "objectives/latent/nitp.py": (
            ("z = z.masked_fill(~targets.unsqueeze(-1), 0)", "pass", "engine/streams/padding"),
            # the objectives
            ("* info.num_layers + 0.75", "* info.num_layers", "engine/spec/build"),
            (
                "            shift = self.shift",
                "            z, shift = z.detach(), self.shift",
                "objectives/latent/nitp_stop_gradient",
            ),
            ("z[:, shift:]", "z[:, :pairs]", "objectives/values"),
        ),
        "nitp_ops/engine/streams/context_parallel.py": (
            ("(rank, 2 * ranks - 1 - rank)", "(rank, ranks + rank)", "engine/cost_model"),
        ),
        "nitp_ops/geometry/streaming.py": (
            ("* (n * m / (n + m))", "* (n * m / n)", "geometry/accumulator"),
        ),
        "nitp_ops/engine/streams/targets.py": (
            # which rows count, and what divides them
            ("values, k, *span", "values, k - 1, *span", "engine/streams/shift"),
            (
                "k, streams, -1) == here) & (here >= 0)",
                "k, streams, -1) == here)",
                "engine/streams/shift objectives/properties",
            ),
            ("(size - first)), fill)", "(size - first)), 0)", "engine/streams/shift"),
            ("high < vocabulary and absent", "high < vocabulary", "engine/shortcuts"),
            # whose document a pre-shifted label belongs to, and where what the streams say of its token counts
            (
                "_after_unknown(here, -1)",
                "torch.cat([here, here[:, -1:]], dim=1)",
                "engine/streams/label_layout",
            ),
            (
                'if streams.label_layout == "document" else ~inside',
                "",
                "engine/streams/label_layout",
            ),
            ("masked | (inside & ~", "masked | (~", "engine/streams/shift"),
            (".masked_fill(~valid_pairs(streams, k), fill)", "", "engine/streams/label_layout"),
        ),
        "nitp_ops/engine/streams/target_window.py": (
            (
                "self.previous[at] < position",
                "self.previous[at] <= position",
                "objectives/tokens/top",
            ),
            ("(k <= self.last)", "(k < self.last)", "objectives/tokens/top"),
            ("range(first - 1)", "range(0)", "engine/streams/windows"),
            ("(coming - base)", "coming", "engine/streams/windows"),
            ("position + 1, after[:, 1:]", "after[:, 1:], after[:, 1:]", "objectives/tokens/top"),
            (".masked_fill(~pairs, 1.0)", "", "engine/streams/label_layout"),
        ),
        "objectives/tokens/top.py": (
            ("math.ceil(-math.log(", "math.ceil(-0.1 * math.log(", "engine/streams/windows"),
            ("self.window + 1 - k", "k - 1", "objectives/tokens/top"),
        ),
        "nitp_ops/engine/streams/document_ids.py": (
            ("positions[:, :-1] + 1", "positions[:, :-1]", "engine/streams/shift"),
        ),
        "nitp_ops/engine/window.py": (
            (
                'self.gradient_reduction == "sum"',
                'self.gradient_reduction == "mean"',
                "distributed/objectives/objectives",
            ),
        ),
        "nitp_ops/engine/plan/weighting.py": (
            ("max(count.item(), 1)", "count.item()", "objectives/properties"),
            ("count.clamp(min=1)", "count", "engine/shortcuts"),
            ("torch.where(active, gradients[0], 0)", "gradients[0]", "objectives/properties"),
        ),
        "nitp_ops/engine/composite.py": (
            ("torch.where(coefficients[name] == 0, 0, part.loss)", "part.loss", "engine/plan"),
        ),
        "nitp_ops/engine/plan/head_terms.py": (
            ("self.term == other.term and ", "", "objectives/tokens/mtp_shared engine/plan"),
            ("torch.where(present, active, 0)", "present.to(active.dtype)", "engine/sets"),
            ("(1 - self.rows.label_smoothing) * ", "", "objectives/tokens/mtp_shared"),
        ),
        "nitp_ops/engine/skill.py": (
            (
                "math.nan, 1 - loss / constant",
                "math.nan, loss / constant",
                "objectives/latent/nitp_skill engine/metrics",
            ),
            (
                "begin + shift : end + shift",
                "begin : end",
                "objectives/latent/nitp_skill engine/metrics",
            ),
        ),
        "objectives/tokens/mtp_sequential.py": (
            ("return 1 / self.depth", "return 1.0", "objectives/tokens/mtp_sequential"),
            ("normed if self.normed", "state if self.normed", "objectives/tokens/mtp_sequential"),
        ),
        "objectives/tokens/mtp_shared.py": (
            (
                "self.weights[self.offsets.index(int(part))]",
                "self.weights[0]",
                "objectives/tokens/mtp_shared",
            ),
        ),
        "nitp_ops/engine/modules/projector.py": (
            ("return gate_up, down", "return gate_up.flip(0), down", "objectives/values"),
        ),
        "objectives/tokens/mtp_parallel.py": (
            ("streams, f, k)", "streams, f, 1)", "objectives/tokens/mtp_parallel"),
        ),
        "objectives/regularizers/cosine_regularizer.py": (
            ("- unit.square().sum()", "", "objectives/regularizers/cosine_regularizer"),
        ),
        "objectives/latent/nextlat.py": (
            ("log_p.exp() - q", "q - log_p.exp()", "objectives/latent/nextlat"),
        ),
        "objectives/latent/fsp_bow.py": (
            (
                "scatter_add_(1, bag, -counted)",
                "scatter_add_(1, bag, counted)",
                "objectives/latent/fsp_bow",
            ),
        ),
        "objectives/tokens/ntp.py": (
            (
                "replace(rows, class_weight=",
                "replace(rows, token_weight=",
                "objectives/class_weight",
            ),
        ),
        "nitp_ops/engine/spec/schedule.py": (
            ("torch.where(step >= begin", "torch.where(step > begin", "engine/spec/schedule"),
        ),
        "nitp_ops/engine/metrics.py": (
            ('own["weighted"] / own', 'own["loss"] / own', "engine/metrics"),
        ),
        "nitp_ops/engine/counts.py": (
            ("self[part] + other[part]", "other[part]", "objectives/properties"),
        ),
        "nitp_ops/engine/drafting/decoding.py": (
            # drafting and decoding
            ("== drafts).cumprod(0)", "== drafts)", "engine/draft"),
        ),
        "nitp_ops/engine/drafting/drafters.py": (
            ("max(0, same - k)", "max(0, same)", "engine/draft"),
        ),
        "nitp_ops/engine/modules/blocks.py": (
            (
                ".unsqueeze(-1) >= position\n        return",
                ".unsqueeze(-1) > -1\n        return",
                "engine/draft",
            ),
        ),
        "experiments/train/model.py": (
            ("self.cosine[start:stop]", "self.cosine[: stop - start]", "experiments/draft"),
        ),
    }
)
