"""One training step (forward, backward, AdamW) of the `tiny` preset against transformers' Mixtral of the same sizes.

In: packed random documents of 20 to 120 tokens. Out: a table. Same layers, width, heads, experts, experts per token, tokens,
vocabulary and targets. Mixtral's experts are as wide as our shared and routed one together: equal arithmetic per token.
Mixtral gets the documents in rows of 512 with a ready block-diagonal mask (its own packing would build one of T x T), and the
faster of its expert implementations. It computes the loss over the whole vocabulary; ours reads each token's slice, which is
part of the design: the row "one slice" takes that advantage away.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.benchmarks.speed.report import Row, compare, finish, measure, speed_parser, start

VOCAB = 3000
SLICES = ((0, 2200), (2200, 2700), (2700, 2850), (2850, 2950), (2950, VOCAB))
ROW = 512


@dataclass(frozen=True)
class Data:
    """T packed tokens whose documents never cross a row of ROW tokens."""

    batch: Any  # what our model reads
    target: Tensor  # [T]
    target_slice: Tensor  # [T]
    mask: Tensor  # bool [T / ROW 1 ROW ROW], who sees whom in Mixtral's rows


def data(tokens: int, one_slice: bool) -> Data:
    """Random documents; targets lie in random slices, or all in one that is the whole vocabulary."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        room = ROW - sum(lengths) % ROW
        lengths.append(min(room, int(torch.randint(20, 121, ()))))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    place = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor(lengths).cumsum(0) - 1
    landmark = torch.zeros(tokens, dtype=torch.bool)
    landmark[ends] = True
    kind = torch.zeros(tokens, dtype=torch.int64) if one_slice else torch.randint(0, len(SLICES), (tokens,))
    first, end = torch.tensor(((0, VOCAB),) if one_slice else SLICES).unbind(1)
    target = first[kind] + (torch.rand(tokens) * (end - first)[kind]).long()
    batch = SimpleNamespace(
        ids=torch.randint(1, VOCAB, (tokens,)),
        modality=torch.zeros(tokens, dtype=torch.int64),
        channel=torch.zeros(tokens, dtype=torch.int64),
        position=place[:, None].expand(-1, 3).int(),
        document=document,
        landmark=landmark,
        two_way=torch.full((tokens,), -1, dtype=torch.int32),
        features={},
        feature_at={},
    )
    rows = document.view(-1, ROW)
    mask = (rows[:, :, None] == rows[:, None, :]) & torch.ones(ROW, ROW, dtype=torch.bool).tril()
    return Data(batch, target, kind, mask[:, None])


def ours(config: Any, given: Data, slices: Any, lower: bool) -> Callable[[], float]:
    """A step of our model."""
    from weft.kernels.sliced_loss import sliced_cross_entropy
    from weft.model.init import param_groups
    from weft.model.transformer import Transformer

    model = Transformer(config)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3), fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            output = model(given.batch)
            nll, _ = sliced_cross_entropy(output.hidden, model.output_weight, given.target, given.target_slice, slices)
            loss = nll.mean() + 1e-3 * output.router.z_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_router_bias(output.router.load)
        return float(nll.detach().mean())

    return step


def mixtral(config: Any, tokens: int, experts_implementation: str) -> Any:
    """transformers' Mixtral with our sizes."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.shared_width + config.expert_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "max_position_embeddings": tokens,
        "experts_implementation": experts_implementation,
    }
    theirs = MixtralConfig(**sizes)
    return MixtralForCausalLM(theirs)


def rival(config: Any, given: Data, lower: bool, experts_implementation: str) -> Callable[[], float]:
    """A step of Mixtral on the same documents and targets."""
    model = mixtral(config, ROW, experts_implementation)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    shape = given.mask.shape[0], ROW
    ids, position, target = given.batch.ids.view(shape), given.batch.position[:, 0].long().view(shape), given.target
    bias = torch.zeros(given.mask.shape).masked_fill_(~given.mask, float("-inf"))
    bias = bias.to(torch.bfloat16) if lower else bias

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            output = model(input_ids=ids, attention_mask=bias, position_ids=position, use_cache=False)
        loss = F.cross_entropy(output.logits.float().flatten(0, 1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def fastest(makers: Mapping[str, Callable[[], Callable[[], float]]]) -> tuple[str, Callable[[], float]]:
    """The quickest of several versions that run here, by the second step of each."""
    best: tuple[float, str, Callable[[], float]] | None = None
    for name, make in makers.items():
        try:
            step = make()
            step()
            begin = time.perf_counter()
            step()
            seconds = time.perf_counter() - begin
        except (RuntimeError, ValueError, NotImplementedError) as error:  # transformers refuses some of them on some machines
            print(f"left out: Mixtral's {name} does not run here ({error})", file=sys.stderr)
            continue
        if best is None or seconds < best[0]:
            best = (seconds, name, step)
    if best is None:
        raise RuntimeError("none of Mixtral's expert implementations runs here")
    return best[1], best[2]


def row(name: str, tokens: int, rounds: int, lower: bool, one_slice: bool, changes: dict[str, Any]) -> Row:
    """Time both sides on the same data."""
    from weft.model.presets import preset

    slices = ((0, VOCAB),) if one_slice else SLICES
    config = preset("tiny", vocab_size=VOCAB, slices=slices, **changes)
    given = data(tokens, one_slice)
    step = ours(config, given, slices, lower)
    makers = {kind: partial(rival, config, given, lower, kind) for kind in ("eager", "grouped_mm")}
    kind, theirs = fastest(makers)
    time_s = measure({"ours": step, "rival": theirs}, rounds=rounds)
    speed = {who: tokens / seconds for who, seconds in time_s.items()}
    note = f"Mixtral experts: {kind}; loss after {rounds + 1} steps {step():.3f} / {theirs():.3f}"
    return compare(name, speed["ours"], speed["rival"], unit="tok/s", must=1.0, aim=1.5, more_is_better=True, note=note)


def main() -> None:
    """Run the table."""
    parser = speed_parser("train_step", __doc__.splitlines()[0])
    args = parser.parse_args()
    try:
        import transformers
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the rival needs transformers: pip install 'weft[eval]'") from None
    transformers.logging.set_verbosity_error()
    start(args)
    tokens, rounds = (2048, 4) if args.quick else (4096, 15)
    top2 = {"experts_per_token": 2}
    rows = [
        row("tiny, six modalities, bf16 autocast", tokens, rounds, True, False, {}),
        row("tiny, six modalities, fp32", tokens, rounds, False, False, {}),
        row("tiny, one slice, fp32", tokens, rounds, False, True, {}),
        row("tiny, top-2 of 4, six modalities, fp32", tokens, rounds, False, False, top2),
    ]
    finish(rows, args)


if __name__ == "__main__":
    main()
