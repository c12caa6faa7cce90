"""Experts play well, demonstrations are labelled by them, and a disturbed action never hides inside a fragment."""

import numpy as np
import pytest

from weft.benchmarks.world.control import EXPERTS, PLANTS, episode_returns, fragments, make, normalised

LEAST = {"CartPole-v1": 500, "Pendulum-v1": -400, "MountainCarContinuous-v0": 93, "Acrobot-v1": -140}


@pytest.mark.parametrize("name", PLANTS)
def test_expert_reaches_its_stated_return(name: str) -> None:
    assert episode_returns(name, EXPERTS[name], 4).min() >= LEAST[name]


@pytest.mark.parametrize("name", PLANTS)
def test_plant_describes_its_environment(name: str) -> None:
    plant, environment = PLANTS[name], make(name)
    assert environment.observation_space.shape == (len(plant.channels),) == (len(plant.units),)
    if plant.choices:
        assert environment.action_space.n == plant.choices
    else:
        assert environment.action_space.low.tolist() == [plant.low] and environment.action_space.high.tolist() == [plant.high]


@pytest.mark.parametrize("name", PLANTS)
def test_fragments_hold_the_experts_action_for_every_reading(name: str) -> None:
    found = fragments(name, 23, 3, {1: 0.5, 4: 0.5})
    assert len(found) == 23 and {len(readings) for readings, _ in found} == {1, 4}
    for readings, labels in found:
        assert np.array_equal(labels, np.stack([np.atleast_1d(EXPERTS[name](r)) for r in readings]))


def test_a_fragment_is_what_the_environment_does_under_its_labels() -> None:
    """CartPole's equations, stepped by hand from each reading with the labelled action, give the next reading."""
    environment = make("CartPole-v1")
    environment.reset(seed=0)
    for readings, labels in fragments("CartPole-v1", 11, 5, {4: 1.0}):
        for k in range(3):
            environment.unwrapped.state = readings[k].astype(np.float64)
            after, *_ = environment.unwrapped.step(int(labels[k][0]))
            np.testing.assert_allclose(after, readings[k + 1], atol=1e-5)


def test_fragments_depend_on_their_seed_alone() -> None:
    a, b, c = (fragments("Pendulum-v1", 7, seed, {1: 1.0}) for seed in (1, 1, 2))
    assert all(np.array_equal(x[0], y[0]) for x, y in zip(a, b))
    assert not all(np.array_equal(x[0], y[0]) for x, y in zip(a, c))


def test_normalised_return_is_zero_at_random_and_hundred_at_expert() -> None:
    assert normalised(-3, {"random": -3, "expert": 5}) == 0 and normalised(5, {"random": -3, "expert": 5}) == 100
