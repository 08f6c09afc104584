"""Options that InfLLM and EM-LLM share.

Who chooses (`selection`):

- ``causal``: an execution block is answered with what the mean query of the one before it chooses; one of given
  tokens (a question, which is not predicted), or of one token by configuration, chooses by its own mean query.
- ``official``: by its own mean query, so that its first token is answered with what its later tokens chose.
- ``token``: every token by its own query alone. Its attention is masked, so it costs what full attention does.
- ``random``: as many as ``causal`` takes, drawn from a generator of the row's seed and place: a control.
"""

from dataclasses import dataclass
from typing import Literal

from memory_bench.choices import check_choices
from memory_bench.errors import UserError


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """Options of both methods; symbols of InfLLM's code in brackets."""

    segment: int = 512  # text tokens per step
    execution_block: int = 512  # tokens that choose at once [exc_block_size]; counted anew in every step
    local_window: int = 4096  # tokens attended to at their true distance [n_local]
    sink_tokens: int = 128  # first tokens, always attended to [n_init]
    representative_tokens: int = 4  # a block is found by the mean key of so many [repr_topk]
    selection: Literal["causal", "official", "token", "random"] = "causal"  # who chooses the blocks, see the module
    # exact: a pending token is far once it has left a query's window; none: official, up to execution_block - 1 tokens
    # are attended twice, at their true distance and at the constant one.
    far_mask: Literal["exact", "none"] = "exact"

    def check(self, name: str, *more: str) -> None:
        """Refuse sizes that cannot be; `more` are other fields that must be at least 1.

        Raises:
            UserError: naming option and choices.
        """
        for field in ("segment", "execution_block", "local_window", "representative_tokens", *more):
            if getattr(self, field) < 1:
                raise UserError(f"{name}: {field} must be at least 1.")
        if self.sink_tokens < 0:
            raise UserError(f"{name}: sink_tokens cannot be negative.")
        if self.execution_block > self.local_window:
            raise UserError(
                f"{name}: execution_block = {self.execution_block} must not exceed local_window = {self.local_window}."
            )
        check_choices(name, self)
