"""Feeds token sequences to executors chunk by chunk, through scattered KV blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class PagedSequences:
    """Sequences of known tokens, and how much of each is in the cache."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], num_blocks: int, block_size: int, seed: int = 0
    ) -> None:
        self.sequences = [np.asarray(tokens, np.int32) for tokens in sequences]
        self.num_computed = [0] * len(sequences)
        self._block_size = block_size
        self._free = list(np.random.default_rng(seed).permutation(num_blocks))
        width = max(-(-len(tokens) // block_size) for tokens in sequences)
        # Entries beyond a sequence's end are rubbish, as they are in the block manager's matrix.
        self._block_tables = np.full((len(sequences), width), -1, np.int32)
        for row, tokens in enumerate(self.sequences):
            for i in range(-(-len(tokens) // block_size)):
                self._block_tables[row, i] = self._free.pop()

    def step(self, new: Mapping[int, int], logits: Sequence[int] | None = None) -> dict[str, Any]:
        """The arguments of forward_arrays for new[i] more tokens of sequence i.

        logits: rows of the step whose logits are wanted; all of them unless given.
        """
        tokens, positions, slots, starts, lengths = [], [], [], [0], []
        for row, count in new.items():
            at = np.arange(self.num_computed[row], self.num_computed[row] + count)
            assert at[-1] < len(self.sequences[row])
            tokens.append(self.sequences[row][at])
            positions.append(at)
            blocks = self._block_tables[row, at // self._block_size]
            slots.append(blocks * self._block_size + at % self._block_size)
            starts.append(starts[-1] + count)
            self.num_computed[row] += count
            lengths.append(self.num_computed[row])
        return {
            "token_ids": np.concatenate(tokens).astype(np.int32),
            "positions": np.concatenate(positions).astype(np.int32),
            "slot_mapping": np.concatenate(slots).astype(np.int32),
            "query_start_loc": np.asarray(starts, np.int32),
            "seq_lens": np.asarray(lengths, np.int32),
            "block_tables": self._block_tables[list(new)],
            "logits_indices": np.asarray(
                range(starts[-1]) if logits is None else logits, dtype=np.int32
            ),
        }


def run_in_chunks(
    executor: Any,
    tokens: Sequence[int],
    chunk_sizes: Sequence[int],
    num_blocks: int,
    block_size: int,
) -> FloatArray:
    """Logits of every token of one sequence, computed in chunks: [len(tokens), vocab_size]."""
    paged = PagedSequences([tokens], num_blocks, block_size)
    assert sum(chunk_sizes) == len(tokens)
    return np.concatenate(
        [executor.forward_arrays(**paged.step({0: size})) for size in chunk_sizes]
    )


def relative_error(actual: FloatArray, expected: FloatArray) -> float:
    """The largest difference, as a share of the largest expected value."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
