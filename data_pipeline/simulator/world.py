"""One scene's world: streets, light and weather, the ego's drive, other road users, and the words that describe it.

Everything is drawn from (seed, index), so the same arguments give the same world to the last bit. Over each block of eight
consecutive scenes the manoeuvres, the weather, the hour and the city are dealt like cards, so a small data set still has them all.
"""

import dataclasses

import numpy as np

from data_pipeline.simulator.network import Network, make_network
from data_pipeline.simulator.population import LEAD_METRES, Population
from data_pipeline.simulator.route import EGO_CENTRE, EGO_SIZE, STOP_GAP, Drive, drive, ego_path
from data_pipeline.simulator.scenery import Scenery, make_scenery
from data_pipeline.simulator.traffic import Actor
from mila_jax import geometry

MANOEUVRES = ("straight", "left", "right", "stop", "lane_change", "left", "right", "straight")
LOCATIONS = ("boston-seaport", "singapore-onenorth", "boston-seaport", "singapore-queenstown", "boston-seaport",
             "singapore-hollandvillage", "boston-seaport", "singapore-onenorth")  # fmt: skip
AMBER = 2.0  # seconds of amber and all-red between two greens


@dataclasses.dataclass(frozen=True)
class World:
    """Everything of one scene.

    name, description, location: as in nuScenes' scene and log tables. night, rain: bool. seconds: length. actors: annotated
    objects. manoeuvre: one of `MANOEUVRES`. origin: [2] map position of the start, metres. go: when the main street's light turns
    green (s; always green when negative). clouds: 0..1, greyness of a dry sky. sun: (azimuth, elevation) in radians.
    """

    name: str
    description: str
    location: str
    night: bool
    rain: bool
    seconds: float
    actors: list[Actor]
    manoeuvre: str
    origin: np.ndarray
    network: Network
    drive: Drive
    scenery: Scenery
    go: float
    clouds: float
    sun: tuple[float, float]

    def ego_pose(self, times):
        """Ego translation [n, 3] in metres (float64) and quaternion [n, 4] (w first) at times [n] s: the rear axle on the ground."""
        state = self.drive.pose(np.asarray(times, np.float64))
        translation = np.concatenate([state[:, :2], np.zeros((len(state), 1))], 1)
        return translation, geometry.yaw_quaternion(state[:, 2])

    def signal(self, main: bool, time: float) -> int:
        """Lamp that burns at a time in seconds for the main or the cross street: 0 red, 1 amber, 2 green."""
        if main:
            return 2 if time >= self.go else 0
        return 2 if time < self.go - 2 * AMBER else 1 if time < self.go - AMBER else 0


def _deal(seed: int, block: int, salt: int, cards):
    """The cards of one block of scenes, shuffled."""
    return [cards[i] for i in np.random.default_rng([seed, block, salt]).permutation(len(cards))]


def _populate(people: Population, network: Network, rng, manoeuvre, go, lead, seconds, busy):
    """Adds all actors; the order decides who is dropped when two would meet."""
    main, cross = network.streets[:2]
    reach = people.drive.at(np.array([seconds]))[0]
    green_cross = go - 2 * AMBER
    stop_main = [(network.crossing - cross.half_width - STOP_GAP, lambda t: t < go)]
    stop_back = [(-network.crossing - cross.half_width - STOP_GAP, lambda t: t < go)]
    stop_cross = [(-main.half_width - STOP_GAP, lambda t: t >= green_cross)]
    people.escorts(lead, rng.random() < 0.6)
    if go > 0:
        windows = [(-1.0, go - 0.5)]
        people.crossers(0, network.crossing - cross.half_width - 2.5, windows, 3)
        people.crossers(0, network.crossing + cross.half_width + 2.5, windows, 2)
    else:
        people.crossers(1, main.half_width + 2.5, [(-1.0, seconds + 1)], 2)
        people.crossers(1, -main.half_width - 2.5, [(-1.0, seconds + 1)], 2)
    cruise = rng.uniform(6.5, 9.0)
    spread = (16, 52) if busy else (28, 90)
    far = min(300.0, 60 + 9 * seconds) + reach * 0.6
    for index in range(main.lanes):
        people.lane(0, -1, index, -20, far, spread, stop_back, cruise)
    for index in range(main.lanes):
        people.lane(0, 1, index, -60, 120, spread, stop_main, cruise)
    for direction in (-1, 1):
        for index in range(cross.lanes):
            people.lane(1, direction, index, -direction * 150, direction * 90, spread, stop_cross, cruise)
    ahead = network.crossing + 40 if manoeuvre in ("left", "right") else reach + 90
    fill = rng.uniform(0.35, 0.85)
    people.parked(0, -50, ahead, fill)
    people.parked(1, -110, 110, fill)
    people.waiting(2, 0.6)
    people.waiting(3, 0.6)
    if rng.random() < 0.35:
        people.works(0, rng.uniform(10, network.crossing + 60), int(rng.choice([-1, 1])))
    walkers = 9 if busy else 5
    people.walkers(0, -30, ahead, walkers, 0.75)
    people.walkers(1, -70, 70, walkers // 2 + 1, 0.75)
    for corner in (-1, 1):
        people.walkers(0, network.crossing + corner * (cross.half_width + 3), network.crossing + corner * (cross.half_width + 9), 2, 0.0)


def _describe(night, rain, manoeuvre, people: Population, lead, go) -> str:
    """A nuScenes-like scene description from what the scene holds; only road users that come within 30 m of the ego count."""
    actors = [
        actor
        for actor, track in zip(people.actors, people.tracks, strict=True)
        if np.linalg.norm(track[:, :2] - people.ego[:, :2], axis=1).min() < 30
    ]
    times = people.times
    words = [w for w, on in (("Night", night), ("Rain", rain)) if on]
    words.append({"straight": "drive straight", "left": "turn left", "right": "turn right", "stop": "wait at light, cross intersection",
                  "lane_change": "change lane"}[manoeuvre])  # fmt: skip
    found = {a.category for a in actors if not a.parked}
    if lead:
        words.append("follow car")
    extras = [
        ("parked cars", sum(a.parked for a in actors) >= 4),
        ("peds crossing", go > 0 and any(abs(a.motion(times)[:, 3]).min() == 0 and a.category.startswith("human") for a in actors)),
        ("peds on sidewalk", sum(a.category.startswith("human") for a in actors) >= 4),
        ("construction", "movable_object.trafficcone" in found),
        ("cyclist", "vehicle.bicycle" in found),
        ("motorcycle", "vehicle.motorcycle" in found),
        ("bus", "vehicle.bus.rigid" in found),
        ("truck", "vehicle.truck" in found),
        ("oncoming traffic", sum(a.category == "vehicle.car" and not a.parked for a in actors) >= 5),
    ]
    words += [text for text, on in extras if on][:4]
    text = ", ".join(words)
    return text[0].upper() + text[1:]


def make_world(seed: int, index: int, seconds: float) -> World:
    """The world of scene `index` (1, 2, …, as in its name) of a data set; seconds: scene length. A pure function of its arguments.

    Blocks of eight numbers, 0 to 7 being the first, have every manoeuvre; the first eight scenes are of two blocks.
    """
    block, place = divmod(index, 8)
    manoeuvre = _deal(seed, block, 1, MANOEUVRES)[place]
    location = _deal(seed, block, 2, LOCATIONS)[place]
    night, rain = _deal(seed, block, 3, [(1, 0), (1, 0), (0, 1), (0, 1), (0, 0), (0, 0), (0, 0), (1, 1) if block % 2 else (0, 0)])[place]
    rng = np.random.default_rng([seed, index, 7])
    city = location.split("-")[0]
    side = 1 if city == "boston" else -1
    turn = {"left": 1, "right": -1}.get(manoeuvre, 0)
    lanes = 2 if manoeuvre == "lane_change" else int(rng.choice([1, 2]))
    lane = (lanes - 1 if turn == -side else 0) if turn else int(rng.integers(lanes))
    change = (float(rng.uniform(0.15, 0.3) * min(seconds, 20) * 8), 1 - lane) if manoeuvre == "lane_change" else None
    approach = 10 + 8 * float(np.clip(rng.uniform(0.25, 0.4) * seconds, 2.5, 7))
    if change:
        approach += 70
    origin = np.round(rng.uniform(300, 1700, 2), 1)
    network = make_network(rng, side=side, turn=turn, lanes=lanes, approach=approach, seconds=seconds, origin=origin)
    lead = bool(manoeuvre in ("straight", "stop", "lane_change") and not change and rng.random() < 0.5)
    go, stop = -10.0, None
    if manoeuvre == "stop":
        go = float(np.clip(rng.uniform(0.5, 0.65) * seconds, 3.0, 16.0))
        line = network.crossing - network.streets[1].half_width - STOP_GAP
        stop = (line - EGO_CENTRE - EGO_SIZE[1] / 2 - 0.8 - (LEAD_METRES if lead else 0.0), go + 0.4)
    cruise = float(rng.uniform(8.5, 11.5) if manoeuvre in ("straight", "lane_change") else rng.uniform(7.0, 8.5))
    track = drive(ego_path(network, turn, lane, change), cruise=cruise, seconds=seconds, stop=stop)
    people = Population(rng, network, track, seconds)
    _populate(people, network, rng, manoeuvre, go, lead, seconds, busy=rng.random() < 0.6)
    reach = float(track.at(np.array([seconds]))[0])
    ahead = network.crossing + 170 if turn else reach + 190
    after = max(190.0, reach - network.crossing + 190) if turn else 190.0
    around = [(-after if turn < 0 else -190.0, after if turn > 0 else 190.0)]
    scenery = make_scenery(rng, network, city, [(-150, ahead), *around, (-130, 130), (-130, 130)])
    sun = (float(rng.uniform(-np.pi, np.pi)), float(rng.uniform(0.55, 1.1)))
    description = _describe(night, rain, manoeuvre, people, lead, go)
    return World(f"scene-{index + 1:04d}", description, location, bool(night), bool(rain), float(seconds), people.actors, manoeuvre,
                 origin, network, track, scenery, go, float(rng.uniform(0.0, 0.6)), sun)  # fmt: skip
