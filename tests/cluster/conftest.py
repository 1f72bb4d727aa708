"""Fixtures of the engine's tests."""

from ..oracles import oracles

__all__ = ["oracles"]
