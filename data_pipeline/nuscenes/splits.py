"""Which scenes belong to which split.

The official lists are facts taken from nuscenes-devkit 1.2.0 (python-sdk/nuscenes/utils/splits.py, Apache-2.0, Motional),
written as ranges of scene numbers. Other versions (simulated ones) bring a splits.json beside their tables.
"""

from pathlib import Path

import msgspec

from mila_jax.errors import UserError

OFFICIAL_RANGES = {
    "train": (
        "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204 206-214 218-220 "
        "222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 467-469 471-472 474-480 499-502 "
        "504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 683-689 695-698 700-701 703-719 726-728 "
        "730-731 733-741 744 746-747 749-752 757-765 767-769 786-787 789-792 803-806 808-813 815-817 819-822 847-856 858 "
        "860-866 868-873 875-878 880 882-903 945 947 949 952-953 955-961 975-984 988-992 994-1025 1044-1058 1074-1102 1104-1110"
    ),
    "val": (
        "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775 777-778 "
        "780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073"
    ),
    "test": (
        "77-91 111-119 140 142-148 265-266 279-282 307-314 333-343 481-498 547-551 601-604 606-624 827-831 833-842 844-846 932-933 935-943 1026-1043"
    ),
    "mini_train": "61 553 655 757 796 1077 1094 1100",
    "mini_val": "103 916",
}
# Official splits of each version, and the plain name that the rest of the project uses for them.
VERSION_SPLITS = {
    "v1.0-trainval": {"train": "train", "val": "val"},
    "v1.0-mini": {"mini_train": "train", "mini_val": "val"},
    "v1.0-test": {"test": "test"},
}


def official_scenes(split: str) -> list[str]:
    """Scene names ("scene-0001", ...) of the official split `split`, ascending."""
    names = []
    for part in OFFICIAL_RANGES[split].split():
        first, _, last = part.partition("-")
        names += [f"scene-{number:04d}" for number in range(int(first), int(last or first) + 1)]
    return names


def read_splits(path: Path) -> dict[str, list[str]]:
    """A splits.json: {"train": [scene names], "val": [scene names]}; UserError naming the file when it is anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, list[str]])
    except (msgspec.DecodeError, OSError) as error:
        raise UserError(f'{path}: {error}; it must map "train" and "val" to lists of scene names') from None


def split_of_scenes(folder: Path, version: str, names: list[str]) -> dict[str, str]:
    """Split ("train", "val" or "test") of each scene name: from splits.json in `folder` when it exists, else official.

    Raises UserError when a scene has no split.
    """
    path = Path(folder) / "splits.json"
    if path.exists():
        lists, origin = read_splits(path), str(path)
    elif version in VERSION_SPLITS:
        lists = {plain: official_scenes(name) for name, plain in VERSION_SPLITS[version].items()}
        origin = f"the official split of {version}"
    else:
        raise UserError(f'{path} is missing and {version!r} has no official split; write the file as {{"train": [scene names], "val": [...]}}')
    split_of = {name: split for split, members in lists.items() for name in members}
    unknown = [name for name in names if name not in split_of]
    if unknown:
        raise UserError(f"scene {unknown[0]!r} ({len(unknown)} in all) is in no split of {origin}; add it to {path}")
    return {name: split_of[name] for name in names}
