"""A mixture of experts on a GPU, with shapes that do not depend on the tokens' choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from fastpage.executors.fixed_rows import FixedRows

# Up to so many tokens every expert computes all of them: by then nearly all experts are read for
# some token anyhow, and to read them is what a step's time is. Beyond, to compute is.
MOST_TOKENS_FOR_ALL = 256

Activate = Callable[[torch.Tensor], torch.Tensor]


class Experts:
    """Of one op. gate_up: [experts, 2 * intermediate, hidden]; down: [experts, hidden,
    intermediate]."""

    def __init__(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *,
        top_k: int,
        renormalize: bool,
        activate: Activate,
        fixed_rows: FixedRows | None = None,
    ) -> None:
        """fixed_rows: of all products, so that a token's result does not depend on the others."""
        self._gate_up, self._down = gate_up, down
        self._top_k, self._renormalize, self._activate = top_k, renormalize, activate
        self._fixed_rows = fixed_rows

    def run(self, x: torch.Tensor, logits: torch.Tensor, may_wait: bool) -> torch.Tensor:
        """x: [tokens, hidden]; logits: [tokens, experts]. Waits for the device, once, only if
        may_wait, and for so many tokens that it is worth it."""
        if self._fixed_rows is not None:
            name = f"experts of {list(self._gate_up.shape)}"
            return self._fixed_rows.run(name, self._into, x.shape[1], x, logits)
        chosen, shares = self._choose(x, logits)
        # To gather an expert's weights is to read them twice and to write them once.
        if 3 * chosen.numel() < len(self._down):
            return self._by_choice(x, chosen, shares)
        if may_wait and len(x) > MOST_TOKENS_FOR_ALL:
            return self._by_expert(x, chosen, shares)
        return self._by_all(x, chosen, shares)

    def _into(self, out: torch.Tensor, x: torch.Tensor, logits: torch.Tensor) -> None:
        out.copy_(self._by_all(x, *self._choose(x, logits)))

    def _choose(self, x: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's experts, and what their results are multiplied by."""
        probabilities = logits.float().softmax(dim=1)
        # topk does not say which of equal ones it takes.
        chosen = logits.float().sort(dim=1, descending=True, stable=True).indices[:, : self._top_k]
        # In the experts' order, which is that of the sums.
        chosen = chosen.sort(dim=1).values
        shares = probabilities.gather(1, chosen)
        if self._renormalize:
            shares = shares / shares.sum(dim=1, keepdim=True)
        return chosen, shares.to(x.dtype)

    def _by_choice(
        self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """The weights of each choice."""
        experts = chosen.flatten()
        each = x.unsqueeze(1).expand(-1, self._top_k, -1).flatten(0, 1).unsqueeze(1)
        gated = self._gated(each, self._gate_up.index_select(0, experts))
        parts = gated.bmm(self._down.index_select(0, experts).transpose(1, 2))
        return (parts.squeeze(1).unflatten(0, chosen.shape) * shares.unsqueeze(2)).sum(dim=1)

    def _by_all(self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """All tokens through all experts, of which those that were not chosen do not count."""
        count = len(self._down)
        gated = self._gated(x.expand(count, *x.shape), self._gate_up)
        parts = gated.bmm(self._down.transpose(1, 2))
        of_all = shares.new_zeros(len(x), count).scatter_(1, chosen, shares)
        is_chosen = torch.zeros_like(of_all, dtype=torch.bool).scatter_(1, chosen, True)
        parts *= of_all.t().unsqueeze(2)
        # What was not asked of an expert may be infinite.
        return parts.masked_fill_(~is_chosen.t().unsqueeze(2), 0).sum(dim=0)

    def _by_expert(
        self, x: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Tokens sorted by expert, of which the CPU has to know the numbers."""
        order = chosen.flatten().sort(stable=True).indices
        counts = chosen.flatten().bincount(minlength=len(self._down)).tolist()
        rows = order // self._top_k
        each = x.index_select(0, rows)
        parts = torch.empty_like(each)
        for expert, part in _slices(counts):
            gated = functional.linear(each[part], self._gate_up[expert])
            parts[part] = functional.linear(self._activate(gated), self._down[expert])
        parts *= shares.flatten().index_select(0, order).unsqueeze(1)
        # Back to the choices' order, so that sums have one order.
        back = torch.empty_like(parts).index_copy_(0, order, parts)
        return back.unflatten(0, chosen.shape).sum(dim=1)

    def _gated(self, x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        """[n, rows, hidden] by [n, 2 * intermediate, hidden]."""
        y = x.bmm(gate_up.transpose(1, 2))
        return self._activate(y.flatten(0, 1)).unflatten(0, y.shape[:2])


def _slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(begin, begin + count)
        begin += count
