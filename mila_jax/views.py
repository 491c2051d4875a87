"""The six cameras: their one order, and how a person looks at them.

Arrays with a view axis `v` follow `VIEWS`, the ring around the car (each camera overlaps the next one, the last overlaps the
first). Look a camera up by name; never write its number.
"""

VIEWS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
)

# As the car sees it: the front row over the back row; the back row is what a driver sees when turning round to the left.
GRID = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
)


def view_index(name: str) -> int:
    """Position of camera `name` in `VIEWS`; `KeyError` with the known names otherwise."""
    try:
        return VIEWS.index(name)
    except ValueError:
        raise KeyError(f"unknown camera {name!r}; known: {', '.join(VIEWS)}") from None


def neighbours() -> list[tuple[int, int]]:
    """Pairs of view indices whose cameras see a common strip of the world, going round the ring once."""
    return [(i, (i + 1) % len(VIEWS)) for i in range(len(VIEWS))]
