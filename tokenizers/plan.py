"""Which tokens bear loss, and how much: data, with the field's presets.

A segment whose role is "target" weighs `target[modality]`, an observed one `observed[modality]`. A segment whose role is
"either" becomes a target with probability `generate[modality]`, drawn per document.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LossPlan:
    """Loss weight per modality for both roles, and how often an undecided segment is generated."""

    target: dict[str, float] = field(default_factory=dict)
    observed: dict[str, float] = field(default_factory=dict)
    generate: dict[str, float] = field(default_factory=dict)

    def weight(self, modality: str, is_target: bool) -> float:
        """Loss weight of one token of `modality`."""
        return (self.target if is_target else self.observed).get(modality, 0.0)


_ALL = ("text", "image", "video", "audio", "sensor", "action")

PRESETS: dict[str, LossPlan] = {
    # Gato: the loss is on text and actions only (arXiv 2205.06175, section 2.3).
    "gato": LossPlan(target={"text": 1.0, "action": 1.0}, observed={"text": 1.0}, generate={"text": 1.0, "action": 1.0}),
    # JAT: observations weigh 0.005 (arXiv 2402.09844).
    "jat": LossPlan(
        target={**{m: 0.005 for m in _ALL}, "text": 1.0, "action": 0.995},
        observed={"text": 1.0},
        generate={m: 1.0 for m in _ALL},
    ),
    # Everything can be generated; observed text is learnt too.
    "dense": LossPlan(target={m: 1.0 for m in _ALL}, observed={"text": 1.0}, generate={**{m: 0.5 for m in _ALL}, "text": 1.0}),
    # Only what a document marks as target.
    "instruct": LossPlan(target={m: 1.0 for m in _ALL}),
}
