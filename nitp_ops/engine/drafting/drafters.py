"""How each kind of head guesses tokens ahead, one sequence at a time; see `drafting`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nitp_ops.engine.modules.blocks import KeyValues
from nitp_ops.engine.modules.head_access import embedded, logits
from nitp_ops.engine.streams.model_info import ModelInfo
from nitp_ops.engine.streams.streams import Streams


class SharedDrafter:
    """mtp_shared: after the most probable token of the last row of logits, the second, the third,
    ...

    One row of logits stands for several tokens ahead and does not say in which order they come.
    """

    source, needs = "last_hidden", ()

    def __init__(self, offsets: Sequence[int], info: ModelInfo) -> None:
        self.reach, self.info = min(max(offsets), info.vocab_size) - 1, info

    def propose(self, hidden: Tensor, tokens: Tensor, streams: Streams, count: int) -> Tensor:
        assert streams.head is not None
        return logits(streams.head, hidden[0, -1], self.info).topk(count + 1).indices[1:]


class ParallelDrafter:
    """mtp_parallel: head i at position s guesses x_{s+i}; each token by the smallest i whose
    position has been read.

    With consecutive offsets every guess comes from the last position. With gaps, as in L-MTP's 1,
    3, 5, 7, the tokens between come from the position before it.
    """

    source, needs = "last_hidden", ()

    def __init__(self, heads: Sequence[nn.Module], offsets: Sequence[int], info: ModelInfo) -> None:
        pairs = sorted(zip(offsets, heads, strict=True), key=lambda pair: pair[0])
        # offset 1 is the model's own choice
        self.heads = {k: Growing(head) for k, head in pairs if k > 1}
        self.states: dict[int, Tensor] = {}
        self.reach, self.info = max(offsets) - 1, info

    def propose(self, hidden: Tensor, tokens: Tensor, streams: Streams, count: int) -> Tensor:
        assert streams.head is not None
        for k, head in self.heads.items():
            new = head.extend(hidden)
            self.states[k] = (
                torch.cat([self.states[k], new], dim=1)[:, -self.reach - 1 :]
                if k in self.states
                else new
            )
        rows = []
        for ahead in range(1, count + 1):
            k = min(k for k in self.heads if k > ahead)
            # x_{n+ahead} by head k at n + ahead - k, the last position that was read is n - 1
            back = k - ahead
            if back > self.states[k].shape[1]:
                break
            rows.append(self.states[k][0, -back])
        if not rows:
            return tokens.new_empty(0)
        return logits(streams.head, torch.stack(rows), self.info).argmax(-1)


class SequentialDrafter:
    """mtp_sequential: module k reads the guess of module k - 1 and makes the next.

    What module k computed at position s stands on the tokens up to s + k; where they were drafts
    that did not come true it is computed again.
    """

    def __init__(self, modules: Sequence[nn.Module], source: str, info: ModelInfo) -> None:
        self.modules = modules
        self.source, self.needs, self.reach, self.info = source, ("embed",), len(modules), info
        self.blocks = [Growing(module.block) for module in modules]  # type: ignore[arg-type]
        self.states: list[Tensor | None] = [None] * (len(modules) + 1)
        """h^0 .. h^D as the next module reads them, [1, n, d]."""
        self.read: Tensor | None = None
        """The tokens of the last call, drafts included."""

    def propose(self, hidden: Tensor, tokens: Tensor, streams: Streams, count: int) -> Tensor:
        assert streams.head is not None and streams.embed is not None
        self._forget(tokens)
        first = self.states[0]
        self.states[0] = hidden if first is None else torch.cat([first, hidden], dim=1)
        known = tokens.shape[1]
        for k, (module, block) in enumerate(
            zip(self.modules[:count], self.blocks, strict=False), start=1
        ):
            before, own = self.states[k - 1], self.states[k]
            assert before is not None
            start = 0 if own is None else own.shape[1]
            embeddings = embedded(streams.embed, tokens[:, start + k : before.shape[1] + k])
            state = block.extend(module.enter(embeddings, before[:, start:]))  # type: ignore[operator]
            normed = module.norm(state)  # type: ignore[operator]
            following = normed if self.source == "last_hidden" else state
            self.states[k] = following if own is None else torch.cat([own, following], dim=1)
            draft = logits(streams.head, normed[:, -1:], self.info).argmax(-1)
            tokens = torch.cat([tokens, draft], dim=1)
        self.read = tokens
        return tokens[0, known:]

    def _forget(self, tokens: Tensor) -> None:
        """Cut each module back to the positions of accepted tokens."""
        if self.read is None:
            return
        both = min(self.read.shape[1], tokens.shape[1])
        same = int((self.read[0, :both] == tokens[0, :both]).cumprod(0).sum())
        for k, block in enumerate(self.blocks, start=1):
            if (state := self.states[k]) is not None:
                kept = min(state.shape[1], max(0, same - k))
                self.states[k] = state[:, :kept]
                block.cut(kept)


class Growing:
    """A block over positions that arrive in parts, causal.

    A block with a true attribute ``incremental`` takes a `KeyValues` that it fills, ``block(hidden,
    None, past)``; any other reads all its inputs again.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block, self.past = block, KeyValues()
        self.inputs: Tensor | None = None

    def extend(self, hidden: Tensor) -> Tensor:
        """[1, n, d] of the next n positions to what the block makes of them."""
        hidden = hidden.to(next(self.block.parameters()).dtype)
        if getattr(self.block, "incremental", False):
            return self.block(hidden, None, self.past)
        self.inputs = hidden if self.inputs is None else torch.cat([self.inputs, hidden], dim=1)
        return self.block(self.inputs, None)[:, -hidden.shape[1] :]

    def cut(self, length: int) -> None:
        """Forget everything after the first ``length`` positions."""
        self.past.cut(length)
        self.inputs = None if self.inputs is None else self.inputs[:, :length]
