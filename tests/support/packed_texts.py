"""Short texts for torchtitan's own text dataset, which packs them: 1 to 20 bytes between a begin
and an end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets import DatasetConfig

BEGIN, END = 256, 257


class Tokenizer(BaseTokenizer):
    """A byte is a token."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config | None = None, **_: Any) -> None:
        super().__init__()
        self.eos_id = END

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        return [BEGIN] * add_bos + list(text.encode()) + [END] * add_eos

    def decode(self, ids: list[int]) -> str:
        return bytes(x for x in ids if x < BEGIN).decode(errors="replace")

    def get_vocab_size(self) -> int:
        return END + 1


def _texts(path: str) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"text": "abcdefghijklmnopqrst"[: 1 + 7 * i % 20]} for i in range(60)]
    )


CONFIG = DatasetConfig(
    path="in memory", loader=_texts, sample_processor=lambda sample: sample["text"]
)
