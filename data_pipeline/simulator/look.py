"""Light and weather of a scene as the numbers the shader needs."""

import numpy as np


def _linear(*srgb):
    return np.array(srgb, np.float64) ** 2.2


def make_look(world) -> dict[str, np.ndarray]:
    """Shader inputs for a world: float32 arrays, scalars [] and colours [3] in linear light.

    night, wet: 0/1; fog: extinction per metre; sun: [3] direction to the sun; sun_light, ambient: radiance; zenith, horizon, cloud,
    ridge: sky colours; cloudiness: 0..1; shadow: darkness of sun shadows; reach: shadow length per metre of height; skyline: phase.
    """
    azimuth, elevation = world.sun
    if world.night:
        elevation = 1.2
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    grey = world.clouds
    look = {
        "sun": sun,
        "sun_light": _linear(1.0, 0.96, 0.88) * (0.80 - 0.25 * grey),
        "ambient": _linear(0.72, 0.76, 0.84),
        "zenith": _linear(0.30, 0.50, 0.83),
        "horizon": _linear(0.80, 0.87, 0.93),
        "cloud": _linear(0.93, 0.94, 0.96),
        "ridge": _linear(0.60, 0.68, 0.72),
        "cloudiness": 0.12 + 0.55 * grey,
        "fog": 0.0022,
        "shadow": 0.62 - 0.3 * grey,
        "reach": 1 / np.tan(elevation),
        "night": 0.0,
        "wet": 0.0,
        "skyline": azimuth,
    }
    if world.rain:
        look |= {
            "sun_light": _linear(0.45, 0.46, 0.48),
            "ambient": _linear(0.74, 0.77, 0.80),
            "zenith": _linear(0.62, 0.66, 0.70),
            "horizon": _linear(0.78, 0.80, 0.82),
            "cloud": _linear(0.72, 0.75, 0.78),
            "ridge": _linear(0.62, 0.66, 0.68),
            "cloudiness": 0.7,
            "fog": 0.0070,
            "shadow": 0.30,
            "reach": 0.25,
            "wet": 1.0,
        }
    if world.night:
        look |= {
            "sun_light": _linear(0.20, 0.24, 0.34),
            "ambient": _linear(0.28, 0.29, 0.36),
            "zenith": _linear(0.08, 0.10, 0.20),
            "horizon": _linear(0.24, 0.22, 0.27),
            "cloud": _linear(0.18, 0.17, 0.23),
            "ridge": _linear(0.15, 0.15, 0.20),
            "cloudiness": 0.5,
            "fog": 0.0030 + 0.003 * look["wet"],
            "shadow": 0.45,
            "reach": 0.25,
            "night": 1.0,
        }
    return {name: np.asarray(value, np.float32) for name, value in look.items()}
