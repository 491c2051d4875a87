"""Waypoints from scenes, files and manoeuvres."""

import json

import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.geometry import yaw_quaternion
from mila_jax.start import choose_trajectory
from mila_jax.trajectory import Trajectory, check_driveable, coasting, from_poses, manoeuvre, read_trajectory, speed_at_start


def test_waypoints_are_in_the_frame_of_the_reference():
    # A circle of radius 10 m driven counter-clockwise at 5 m/s: every reference sees the same waypoints.
    times = np.arange(0, 8, 1 / 48)
    angle = times * 0.5
    circle = Trajectory(times, np.stack([10 * np.sin(angle), 10 * (1 - np.cos(angle)), angle], -1))
    points = circle.waypoints(np.array([[1.0, 1.5, 2.0], [3.0, 3.5, 4.0]]), np.array([1.0, 3.0]))
    np.testing.assert_allclose(points[0], points[1], atol=2e-3)
    np.testing.assert_allclose(points[0, 2], [10 * np.sin(0.5), 10 * (1 - np.cos(0.5)), 0.5], atol=2e-3)
    assert points[0, 2, 1] > 0  # left is positive


def test_goes_on_beyond_its_ends_and_turns_through_pi():
    line = Trajectory(np.array([0.0, 1.0]), np.array([[0, 0, 3.1], [2, 0, -3.1]]))
    turned = 2 * np.pi - 6.2  # in a step, and so in the next
    np.testing.assert_allclose(line.at(2.0), [2 + 2 * np.cos(turned), 2 * np.sin(turned), 3.1 + 2 * turned])
    straight = Trajectory(np.array([0.0, 1.0]), np.array([[0, 0, 0.5], [2, 1, 0.5]]))
    np.testing.assert_allclose(straight.at([-1.0, 3.0]), [[-2, -1, 0.5], [6, 3, 0.5]], atol=1e-9)
    assert abs(line.at(0.5)[2]) > 3  # through ±π, not through 0
    assert abs(line.waypoints(np.array([1.0]), np.array(0.0))[0, 2] - (2 * np.pi - 6.2)) < 1e-6


@pytest.mark.parametrize("rate", [0.5, -0.4])
def test_a_curve_goes_on_as_a_circle_that_the_car_heads_along(rate):
    """Beyond both ends, not only the heading: nobody drives sideways."""

    def circle(t):
        return np.stack([5 / rate * np.sin(rate * t), 5 / rate * (1 - np.cos(rate * t)), rate * t], -1)

    times, beyond = np.arange(-0.25, 1.0, 1 / 12), np.array([-2.0, -0.3, 1.2, 4.0, 15.0])
    np.testing.assert_allclose(Trajectory(times, circle(times)).at(beyond), circle(beyond), atol=1e-6)


@pytest.mark.parametrize("name, turn, forward", [("straight", 0, 64), ("left", np.pi / 2, None), ("right", -np.pi / 2, None), ("stop", 0, 16)])
def test_manoeuvres_do_what_they_say(name, turn, forward):
    end = manoeuvre(name, 10.0, speed=8.0).at(8.0)
    assert end[2] == pytest.approx(turn, abs=0.05)
    if forward is not None:
        assert end[0] == pytest.approx(forward, abs=0.3)
    np.testing.assert_allclose(manoeuvre(name, 10.0).at(0.0), 0, atol=1e-9)
    with pytest.raises(UserError, match="fly"):
        manoeuvre("fly", 1.0)


def test_recorded_poses():
    times = np.array([0.0, 0.5, 1.0])
    translation = np.array([[100.0, 50, 0], [100, 54, 0], [100, 58, 0]])  # driving along world y
    trajectory = from_poses(times, translation, np.tile(yaw_quaternion(np.pi / 2), (3, 1)), reference=1)
    np.testing.assert_allclose(trajectory.at(0.5), [4, 0, 0], atol=1e-9)
    np.testing.assert_allclose(trajectory.at(-0.5), [-4, 0, 0], atol=1e-9)


def test_files(tmp_path):
    rows = [{"t": 0, "x": 0, "y": 0, "yaw": 0}, {"t": 2, "x": 10, "y": 1, "yaw": 0.1}]
    (tmp_path / "w.json").write_text(json.dumps(rows))
    (tmp_path / "w.csv").write_text("t,x,y,yaw\n0,0,0,0\n2,10,1,0.1\n")
    for name in ("w.json", "w.csv"):
        np.testing.assert_allclose(read_trajectory(tmp_path / name).at(1.0), [5, 0.5, 0.05])


@pytest.mark.parametrize(
    "text, match",
    [("t,x,y\n0,0,0\n", "row 1"), ("t,x,y,yaw\n0,0,0,0\n1,a,0,0\n", "row 2"), ("t,x,y,yaw\n0,0,0,0\n", "two rows"), ("t,x,y,yaw\n1,0,0,0\n0,0,0,0\n", "row 2: t = 0 s comes after 1 s"),
     ("t,x,y,yaw\n0,0,0,0\n1,nan,0,0\n", "row 2: x is nan"), ("t,x,y,yaw\n0,0,0,0\n1,5,0,-inf\n", "row 2: yaw is -inf"), ("t,x,y,yaw\n1,1e300,0,0\n2,0,0,0\n", "row 1: x is 1e")],
)  # fmt: skip
def test_bad_files_name_file_and_row(tmp_path, text, match):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(UserError, match=match) as error:
        read_trajectory(tmp_path / "bad.csv")
    assert "bad.csv" in str(error.value)
    with pytest.raises(UserError, match="none.json"):
        read_trajectory(tmp_path / "none.json")


@pytest.mark.parametrize("digits, match", [(400, "row 2: needs numbers"), (5000, "cannot be read as waypoints")])
def test_integers_beyond_all_numbers_name_the_file(tmp_path, digits, match):
    (tmp_path / "bad.json").write_text('[{"t": 0, "x": 0, "y": 0, "yaw": 0}, {"t": 1, "x": %s, "y": 0, "yaw": 0}]' % ("9" * digits))
    with pytest.raises(UserError, match=f"bad.json.* {match}|bad.json, {match}"):
        read_trajectory(tmp_path / "bad.json")


def _drive(times, poses):
    return check_driveable(Trajectory(np.array(times, float), np.array(poses, float)), "drive.csv")


def test_motion_that_no_car_can_drive_names_what_is_wrong():
    straight = np.stack([np.arange(10) * 4.0, np.zeros(10), np.zeros(10)], -1)
    half = np.arange(10) * 0.5
    assert len(_drive(half, straight).times) == 10
    _drive(half, straight + np.arange(10)[:, None] * [0, 0, 0.9])  # counted on beyond a turn
    _drive(half, (straight + np.arange(10)[:, None] * [0, 0, 0.9] + np.pi) % (2 * np.pi) - np.pi)  # or kept within it
    _drive([0, 30], [[0, 0, 0], [200, 0, 0]])  # evenly wide steps are no gap
    for times, poses, match in [
        (half * 1e3, straight, "from 0 to 4500 s, over an hour; t is in seconds"),
        (half * 1e-3, straight, "8000 m/s from t = 0 to 0.0005 s .* seconds"),
        (np.delete(half, [3, 4, 5]), np.delete(straight, [3, 4, 5], 0), "gap in t from 1 to 3 s"),
        (half, straight * 1000, "metres"),
        (half, straight + np.arange(10)[:, None] * [0, 0, 2.0], "yaw that turns by 4.0 rad/s .* yaw is in radians"),
        (half * 8, straight + np.arange(10)[:, None] * [0, 0, 20.0], "yaw that goes from 0 to 20 .* yaw is in radians"),
    ]:
        with pytest.raises(UserError, match=match) as error:
            _drive(times, poses)
        assert "drive.csv" in str(error.value)


def test_coasting_knows_nothing_of_the_future():
    turning = manoeuvre("left", 10.0, speed=8.0)
    ahead = coasting(turning)
    np.testing.assert_allclose(ahead.at(4.0), [32, 0, 0], atol=0.1)
    assert np.abs(turning.at(4.0) - ahead.at(4.0)).max() > 1


def test_coasting_out_of_a_curve_is_straight_ahead():
    """A car in a circle of 10 m at 5 m/s: from time 0 on along its heading, before it as it drove."""
    times = np.arange(-2, 3, 1 / 48)
    circle = Trajectory(times, np.stack([10 * np.sin(times / 2), 10 * (1 - np.cos(times / 2)), times / 2], -1))
    ahead = coasting(circle)
    speed = speed_at_start(circle)
    assert speed == pytest.approx(5, abs=0.02)
    np.testing.assert_allclose(ahead.at([0.5, 3.0, 60.0]), [[0.5 * speed, 0, 0], [3 * speed, 0, 0], [60 * speed, 0, 0]], atol=1e-9)
    np.testing.assert_allclose(ahead.at([-1.0, -0.1, 0.0]), circle.at([-1.0, -0.1, 0.0]), atol=1e-9)


def test_what_was_recorded_is_not_made_up():
    """A manoeuvre, or a file, that starts from a recorded scene: up to time 0 the car stood."""
    times = np.arange(-1, 2, 1 / 12)
    standing = Trajectory(times - times[12], np.zeros((len(times), 3)))
    chosen = choose_trajectory("left", standing, 5.0, 6.0)
    np.testing.assert_allclose(chosen.at([-0.25, -0.1, 0.0]), 0, atol=1e-9)
    assert chosen.at(0.5)[0] == pytest.approx(manoeuvre("left", 15.0, 6.0).at(0.5)[0])
    assert np.abs(choose_trajectory("stop", standing, 5.0, None).at(5.0)).max() == 0  # at the recorded speed
    for name in ("left", "right", "straight"):
        with pytest.raises(UserError, match="stands at --start.*--speed"):
            choose_trajectory(name, standing, 5.0, None)
    for name in ("scene", None, "none", "w.csv"):
        with pytest.raises(UserError, match="--speed goes with --waypoints=straight"):
            choose_trajectory(name, standing, 5.0, 6.0)
    driving = Trajectory(times - times[12], (times - times[12])[:, None] * [[11.0, 0, 0]])
    np.testing.assert_allclose(choose_trajectory("straight", driving, 5.0, None).at([-0.25, 5.0])[:, 0], [-2.75, 55], atol=0.3)
    np.testing.assert_allclose(choose_trajectory("straight", None, 5.0, None).at([-0.25, 5.0])[:, 0], [-2, 40], atol=0.3)


def test_a_file_that_counts_from_elsewhere_joins_what_was_recorded(tmp_path):
    (tmp_path / "w.csv").write_text("t,x,y,yaw\n0,100,50,1.5707963\n6,100,80,1.5707963\n")  # 5 m/s along its own y
    times = np.arange(-1, 2, 1 / 12)
    recorded = Trajectory(times - times[12], (times - times[12])[:, None] * [[5.0, 0, 0]])
    chosen = choose_trajectory(str(tmp_path / "w.csv"), recorded, 5.0, None)
    np.testing.assert_allclose(chosen.at([-0.25, 0.0, 0.1, 5.0]), np.array([-0.25, 0.0, 0.1, 5.0])[:, None] * [5.0, 0, 0], atol=1e-4)
