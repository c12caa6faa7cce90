"""A simulated electric motor with three sensors at three rates, and faults that show in different ones.

In: a fault's name and a seed. Out: phase current (A, 100 Hz), housing vibration (m/s2, 100 Hz) and winding temperature
(degrees C, 2 Hz) over one window.

What each fault does (the textbook signatures, in a simulation of our own): imbalance shakes the housing once per turn; a
bearing defect rings it in short bursts; a broken rotor bar modulates the current's amplitude; a hot winding shows by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FAULTS = ("healthy", "imbalance", "bearing", "broken bar", "hot winding")
RATES_HZ = {"current": 100.0, "vibration": 100.0, "temperature": 2.0}
UNITS = {"current": "A", "vibration": "m/s2", "temperature": "degC"}


@dataclass(frozen=True)
class Window:
    """One recording; every array is float32 [readings]."""

    current: np.ndarray
    vibration: np.ndarray
    temperature: np.ndarray
    fault: str


def run(fault: str, seconds: float, draw: np.random.Generator) -> Window:
    """Record `seconds` of a motor with `fault`: load, speed, phase, ambient temperature and noise are drawn."""
    if fault not in FAULTS:
        raise ValueError(f"unknown motor fault {fault!r}; this motor knows {', '.join(FAULTS)}")
    load, supply_hz = draw.uniform(0.3, 1.0), draw.uniform(8.0, 10.0)
    shaft_hz = supply_hz * (1 - 0.06 * load)
    return Window(
        _current(fault, seconds, load, supply_hz, draw),
        _vibration(fault, seconds, load, shaft_hz, draw),
        _temperature(fault, seconds, load, draw),
        fault,
    )


def _clock(channel: str, seconds: float) -> np.ndarray:
    return np.arange(max(1, round(seconds * RATES_HZ[channel]))) / RATES_HZ[channel]


def _current(fault: str, seconds: float, load: float, supply_hz: float, draw: np.random.Generator) -> np.ndarray:
    at = _clock("current", seconds)
    amplitude = np.full(len(at), 4 + 2 * load)
    if fault == "broken bar":
        amplitude = amplitude * (1 + 0.45 * np.sin(2 * np.pi * (draw.uniform(2.5, 3.5) * at + draw.uniform())))
    wave = amplitude * np.sin(2 * np.pi * (supply_hz * at + draw.uniform()))
    return (wave + draw.normal(0, 0.15, len(at))).astype(np.float32)


def _vibration(fault: str, seconds: float, load: float, shaft_hz: float, draw: np.random.Generator) -> np.ndarray:
    at = _clock("vibration", seconds)
    wave = (0.3 + 0.2 * load) * np.sin(2 * np.pi * (shaft_hz * at + draw.uniform()))
    if fault == "imbalance":
        wave *= draw.uniform(4, 6)
    if fault == "bearing":
        since = (at + draw.uniform(0, 0.1)) % (0.36 / shaft_hz * 2.5)  # a ball passes the defect; the housing rings and decays
        wave = wave + draw.uniform(2.5, 4.0) * np.exp(-since / 0.012) * np.cos(2 * np.pi * 38 * since)
    return (wave + draw.normal(0, 0.12, len(at))).astype(np.float32)


def _temperature(fault: str, seconds: float, load: float, draw: np.random.Generator) -> np.ndarray:
    at = _clock("temperature", seconds)
    rise = 25 + 30 * load + (draw.uniform(35, 50) if fault == "hot winding" else 0)
    return (draw.uniform(15, 25) + rise + 0.05 * at + draw.normal(0, 0.4, len(at))).astype(np.float32)
