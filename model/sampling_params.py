"""How one request wants its tokens drawn. Values only: validation of user input is the gateway's, drawing is
`sampling.py`'s. Plain and frozen, so that it crosses processes as it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling settings.

    Order of application: repetition, presence and frequency penalties, logit_bias, suppression, temperature, then
    min_p, top_k, top_p on the tempered distribution. `temperature == 0` is greedy.
    """

    max_tokens: int
    """Upper bound of generated tokens, at least 1."""
    min_tokens: int = 0
    """End-of-sequence and stop ids are suppressed until this many tokens were generated."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    """Subtracted once from each token generated so far (output only)."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence in the output."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs, added to the logits."""
    seed: int = 0
    """64-bit key of the counter-based noise; the gateway draws one when the user gave none."""
    stop_token_ids: tuple[int, ...] = ()
    """Stop ids beside the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    """Do not stop at the model's end-of-sequence ids (stop_token_ids still stop)."""
    logprobs: int | None = None
    """None: no log-probabilities. k >= 0: the drawn token's and the k most likely ones, of the raw distribution."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0
