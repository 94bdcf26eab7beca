"""Answering prompts: requests, sampling, streaming, and the batch that runs them."""

from moe_peft.generation.answer import generate, generate_tokens, not_finite_message
from moe_peft.generation.request import Completion, Request
from moe_peft.generation.sampling import Sampling

__all__ = ["Completion", "Request", "Sampling", "generate", "generate_tokens", "not_finite_message"]
