"""Which device stands where in the mesh: neighbours on the chip's links stay neighbours, slices meet only along `data`."""

import numpy as np
from jax.experimental import mesh_utils

from mila_jax.errors import UserError


def slices(devices, count: int = -1) -> list[list]:
    """The devices grouped by slice, slices in order of their number. `count`: how many are wanted (mesh.dcn_data); -1 = those there are.

    Devices that know of no slices (CPU, GPU) count as one slice and can be split into any number of equal parts, in their order.
    Raises `UserError` naming the key when the devices lie in another number of slices.
    """
    groups: dict[int, list] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    found = [groups[key] for key in sorted(groups)]
    if count == -1 or count == len(found):
        return found
    if len(found) == 1 and devices[0].platform != "tpu" and count > 0 and len(devices) % count == 0:
        return [list(part) for part in np.split(np.array(devices, object), count)]
    raise UserError(f"mesh.dcn_data={count} does not fit devices in {len(found)} slice(s); set mesh.dcn_data={len(found)} or -1")


def arrange(shape, devices, dcn_data: int = -1) -> np.ndarray:
    """Devices as an array of `shape`, whose first axis (data) is split over the slices.

    Raises `UserError` naming the key when the first axis does not divide by the number of slices.
    """
    parts = slices(list(devices), dcn_data)
    if shape[0] % len(parts):
        raise UserError(f"mesh.data={shape[0]} is not a multiple of mesh.dcn_data={len(parts)} (slices); change mesh.data or mesh.fsdp")
    within = (shape[0] // len(parts), *shape[1:])
    return np.concatenate([_one_slice(within, part) for part in parts], 0)


def _one_slice(shape, devices) -> np.ndarray:
    # The library refuses shapes that cut an axis of the torus (v6e 8×8 as 16×4) unless it is allowed to, and some in any case
    # (part of a slice). The order of the devices is then all there is; the program is the same, its collectives take longer ways.
    for split in (False, True):
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        except (NotImplementedError, ValueError, AssertionError):
            continue
    return np.array(devices, object).reshape(shape)
