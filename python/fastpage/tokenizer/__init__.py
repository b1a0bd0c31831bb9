"""Text to token ids and back: whole, or token by token while it is generated."""

from fastpage.tokenizer.detokenizer import IncrementalDetokenizer
from fastpage.tokenizer.stop_strings import StopStringMatcher
from fastpage.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "StopStringMatcher", "Tokenizer"]
