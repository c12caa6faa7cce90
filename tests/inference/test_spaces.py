"""Action spaces in, legal actions out, or an error that says which number is wrong."""

import numpy as np
import pytest

from weft.inference.errors import SpaceError
from weft.inference.spaces import as_space, check_action, to_env
from weft.tokenizers.segment import ActionSpace


def test_gymnasium_spaces_become_ours() -> None:
    spaces = pytest.importorskip("gymnasium").spaces
    assert as_space(spaces.Discrete(3)) == ActionSpace(n=3)
    assert as_space(spaces.Box(-2.0, 2.0, (2,))) == ActionSpace(low=(-2.0, -2.0), high=(2.0, 2.0))
    assert as_space(4) == ActionSpace(n=4)
    for wrong in (
        spaces.Discrete(3, start=1),
        spaces.Box(-np.inf, np.inf, (1,)),
        spaces.Box(0, 1, (2, 2)),
        spaces.MultiBinary(3),
        True,
        "x",
    ):
        with pytest.raises(SpaceError):
            as_space(wrong)


@pytest.mark.parametrize("value", [-1, 3, 1.0, [0, 1], float("nan")])
def test_illegal_discrete_actions_are_refused(value: object) -> None:
    with pytest.raises(SpaceError):
        check_action(value, ActionSpace(n=3))


@pytest.mark.parametrize("value", [[0.0], [0.0, 5.1], [float("nan"), 5.0], [float("inf"), 5.0], [-1.01, 5.0]])
def test_illegal_box_actions_are_refused_never_clamped(value: list[float]) -> None:
    with pytest.raises(SpaceError):
        check_action(value, ActionSpace(low=(-1.0, 4.0), high=(1.0, 5.0)))


def test_legal_actions_reach_the_environment_in_its_type() -> None:
    spaces = pytest.importorskip("gymnasium").spaces
    assert to_env(check_action(2, ActionSpace(n=3)), ActionSpace(n=3), spaces.Discrete(3)) == 2
    box = spaces.Box(-0.1, 0.1, (1,))
    space = as_space(box)
    for edge in (space.low, space.high):
        assert box.contains(to_env(check_action(edge, space), space, box))
