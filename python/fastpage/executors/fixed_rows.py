"""Matrix products of one shape each, for results that do not depend on the batch.

A library chooses by the shape how to multiply: the number of rows decides in which order a row is
summed up. Here it is asked for the same number each time, a step's last rows beside zeros, so that
every row is one of the same kernel's. What is left to chance is whether that kernel gives a row the
same bits wherever it lies: this is looked at where a product is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fastpage.errors import FastpageError

# To compute so many takes a GPU about as long as to read the weights: decoding costs little more
# than otherwise, and a prompt reads the weights once for so many of its tokens.
NUM_ROWS = 128

Multiply = Callable[..., None]  # of a tensor to write to, and of parts of others


class FixedRows:
    """Computes `num_rows` at a time, neither more nor fewer."""

    def __init__(self, num_rows: int = NUM_ROWS) -> None:
        self._num_rows = num_rows
        self._checked: set[str] = set()

    def rounded(self, num_rows: int) -> int:
        """So many that none have to be added."""
        return -(-num_rows // self._num_rows) * self._num_rows

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        def multiply(out: torch.Tensor, part: torch.Tensor) -> None:
            if bias is None:
                torch.mm(part, weight.t(), out=out)
            else:
                torch.addmm(bias, part, weight.t(), out=out)

        name = f"a linear layer of {list(weight.shape)}{'' if bias is None else ' and a bias'}"
        return self.run(name, multiply, len(weight), x)

    def run(self, name: str, multiply: Multiply, cols: int, *inputs: torch.Tensor) -> torch.Tensor:
        """[rows, cols] of inputs with as many rows. Waits for the device where there was none of
        that name before."""
        if name not in self._checked:
            self._check(name, multiply, cols, *inputs)
            self._checked.add(name)
        num_rows = len(inputs[0])
        out = inputs[0].new_empty(self.rounded(num_rows), cols)
        if num_rows > 0:
            parts = (self._parts(x) for x in inputs)
            for part in zip(out.split(self._num_rows), *parts, strict=True):
                multiply(*part)
        return out[:num_rows]

    def _parts(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """All of one shape, dense, and equally aligned."""
        for part in x.contiguous().split(self._num_rows):
            missing = self._num_rows - len(part)
            yield part if missing == 0 else torch.cat((part, part.new_zeros(missing, x.shape[1])))

    def _check(self, name: str, multiply: Multiply, cols: int, *inputs: torch.Tensor) -> None:
        """Raises FastpageError unless equal rows come out equal to the bit."""
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(1, x.shape[1], generator=generator).to(x) for x in inputs]
        out = inputs[0].new_empty(self._num_rows, cols)
        multiply(out, *(row.repeat(self._num_rows, 1) for row in rows))
        bits = out.view(torch.uint8)
        if not torch.equal(bits, bits[:1].expand_as(bits)):
            raise FastpageError(
                f"batch_invariant: {name}: what comes out for one of {self._num_rows} rows depends "
                "on its place. CUBLAS_WORKSPACE_CONFIG=:16:8 and CUBLASLT_WORKSPACE_SIZE=1 in the "
                "environment keep sums from being split; else leave out batch_invariant"
            )
