"""The output heads of real models: width, vocabulary, softcap, and where those numbers are
published."""

from __future__ import annotations

from dataclasses import dataclass

_PAPER = "arXiv 2605.24956, table 4; V of its cost estimate, all share the Qwen2 tokenizer"
_CONFIG = "config.json"


@dataclass(frozen=True)
class Head:
    """unembedding [vocabulary, width]; softcap: logits become `softcap tanh(z / softcap)` (0: they
    do not)."""

    name: str
    width: int
    vocabulary: int
    source: str
    softcap: int = 0

    def sizes(self, rows: int) -> dict[str, int]:
        """As a case of linear_cross_entropy."""
        cap = {"softcap": self.softcap} if self.softcap else {}
        return {"N": rows, "d": self.width, "V": self.vocabulary, **cap}


HEADS: dict[str, Head] = {
    head.name: head
    for head in (
        Head("GPT-2", 768, 50257, f"openai-community/gpt2, {_CONFIG}"),
        Head("Llama-3-8B", 4096, 128256, f"meta-llama/Meta-Llama-3-8B, {_CONFIG}"),
        Head("Qwen2.5-0.5B", 896, 151936, f"Qwen/Qwen2.5-0.5B, {_CONFIG}"),
        Head("Qwen2.5-7B", 3584, 152064, f"Qwen/Qwen2.5-7B, {_CONFIG}"),
        Head("Gemma-2-2B", 2304, 256000, f"google/gemma-2-2b, {_CONFIG}", softcap=30),
        Head("Gemma-2-9B", 3584, 256000, f"google/gemma-2-9b, {_CONFIG}", softcap=30),
        Head("DeepSeek-V3", 7168, 129280, f"deepseek-ai/DeepSeek-V3, {_CONFIG}"),
        Head("NITP-dense-0.5B", 896, 152064, _PAPER),
        Head("NITP-dense-2B", 1792, 152064, _PAPER),
        Head("NITP-dense-3B", 2560, 152064, _PAPER),
        Head("NITP-MoE-1.9B", 512, 152064, _PAPER),
        Head("NITP-MoE-3B", 768, 152064, _PAPER),
        Head("NITP-MoE-9B", 1280, 152064, _PAPER),
        Head("NITP-MoE-45B", 3072, 152064, "arXiv 2605.24956, appendix C; the same tokenizer"),
    )
}
#: The models whose projector the paper trained.
PROJECTORS = {name: head for name, head in HEADS.items() if name.startswith("NITP-")}
