"""The loss of a four-modality mix: each token's softmax over its own slice, against cross_entropy on full logits.

Same hidden states, matrix and targets; forward and backward. The two losses differ by construction (a smaller softmax), so the
error column compares ours with the naive loss over the same slices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.benchmarks.speed.report import Row, compare, finish, measure, peak_bytes, relative_error, speed_parser, start
from weft.kernels.sliced_loss import sliced_cross_entropy

SIZES = {"text": 65_536, "image": 32_768, "audio": 8_192, "action": 1_024}
MIX = (0.45, 0.45, 0.08, 0.02)


def problem(tokens: int, width: int, shrink: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """hidden, weight, target, slice_index, slices."""
    ends = torch.tensor([size // shrink for size in SIZES.values()]).cumsum(0).tolist()
    slices = list(zip([0, *ends[:-1]], ends))
    index = torch.multinomial(torch.tensor(MIX), tokens, replacement=True)
    borders = torch.tensor(slices)[index]
    target = borders[:, 0] + (torch.rand(tokens) * (borders[:, 1] - borders[:, 0])).long()
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(ends[-1], width) / width**0.5).requires_grad_()
    return hidden, weight, target, index, slices


def naive_sliced(hidden: Tensor, weight: Tensor, target: Tensor, index: Tensor, slices: list[tuple[int, int]]) -> Tensor:
    total = hidden.new_zeros(())
    for number, (first, end) in enumerate(slices):
        here = index == number
        total = total + F.cross_entropy(hidden[here] @ weight[first:end].T, target[here] - first, reduction="sum")
    return total / len(hidden)


def rows_of(name: str, tokens: int, width: int, shrink: int, rounds: int) -> list[Row]:
    hidden, weight, target, index, slices = problem(tokens, width, shrink)

    def gradients(loss: Tensor) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    calls: dict[str, Callable[[], list[Tensor]]] = {
        "ours": lambda: gradients(sliced_cross_entropy(hidden, weight, target, index, slices)[0].mean()),
        "rival": lambda: gradients(F.cross_entropy(hidden @ weight.T, target)),
    }
    recomputed = lambda: gradients(  # noqa: E731
        sliced_cross_entropy(hidden, weight, target, index, slices, keep_bytes=0)[0].mean()
    )
    if hasattr(F, "linear_cross_entropy"):  # torch 2.14
        options = torch.nn.LinearCrossEntropyOptions()
        calls["chunked"] = lambda: gradients(F.linear_cross_entropy(hidden, weight, target, options=options))
    truth = gradients(naive_sliced(hidden, weight, target, index, slices))
    error = max(relative_error(a, b) for a, b in zip(calls["ours"](), truth))
    del truth
    time_s = measure({**calls, "recomputed": recomputed}, rounds)
    memory = {side: peak_bytes(call) / 2**20 for side, call in {**calls, "recomputed": recomputed}.items()}
    rivals = {"rival": "cross_entropy", "chunked": "chunked linear_cross_entropy"}
    rows = []
    for side, rival in rivals.items():
        if side in calls:
            must, aim = (1.8, 2.4) if side == "rival" else (None, None)
            rows.append(compare(f"{name} over {rival}", time_s["ours"], time_s[side], must=must, aim=aim, error=error))
            least = 1.0 if side == "rival" else None
            rows.append(compare(f"{name} over {rival}, peak", memory["ours"], memory[side], unit="MiB", must=least))
    rows.append(compare(f"{name}, nothing kept", time_s["recomputed"], time_s["rival"], must=1.0))
    rows.append(compare(f"{name}, nothing kept, peak", memory["recomputed"], memory["rival"], unit="MiB", must=1.0))
    return rows


def main() -> None:
    args = speed_parser("sliced_loss", __doc__ or "").parse_args()
    start(args)
    if args.quick:
        rows = rows_of("V=26,880 N=1,024 D=256", 1024, 256, 4, rounds=5)
    else:
        rows = rows_of("V=26,880 N=4,096 D=256", 4096, 256, 4, rounds=7)
        rows += rows_of("V=107,520 N=4,096 D=512", 4096, 512, 1, rounds=3)
    finish(rows, args)


if __name__ == "__main__":
    main()
