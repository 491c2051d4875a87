"""Constants of the chips, each with where it comes from, and names of topologies (`v5p:4x4x4`, `2xv5e:16x16` for two slices).

This is the only place with such numbers. "derived" means computed from two others of the same line; "compiler" means that the
TPU compiler itself said so, ahead of time, without hardware.
"""

import dataclasses
import math
import re

from mila_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind can do. Bandwidths and peaks are of one device; see `SOURCES` for how sure each is.

    peak           bf16 FLOP/s
    hbm_bandwidth  B/s
    hbm_limit      GiB that the compiler lets a program use
    link           B/s of one inter-chip link in one direction
    network        B/s of one device to other slices, in one direction
    torus          dimensions of the inter-chip network
    clock          Hz of the cores
    matrix_unit    side of the systolic array: operands are padded to it
    vector         elementary 32-bit operations a cycle (lanes × sublanes × units × cores)
    kernel         (forward, backward): share of the peak that the splash kernel reaches at head width 128
    own            cycles for 1,024 elements of q of each of `OWN_KERNELS`, in which not the matrix units but the vector units are busy
    devices        JAX devices of one chip
    """

    name: str
    peak: float
    hbm_bandwidth: float
    hbm_limit: float
    link: float
    torus: int
    clock: float
    matrix_unit: int
    vector: int
    kernel: tuple[float, float]
    own: tuple[float, ...]
    network: float
    devices: int = 1


OWN_KERNELS = ("temporal_forward", "temporal_backward", "text_forward", "text_backward")

CHIPS = {
    c.name: c
    for c in (
        Chip("v5e", 197e12, 819e9, 15.75, 45e9, 2, 1.5e9, 128, 4096, (0.74, 0.98), (34.8, 64.3, 9.8, 14.0), 3.125e9),
        Chip("v5p", 459e12, 2765e9, 95.74, 90e9, 3, 1.75e9, 128, 8192, (0.69, 0.83), (17.3, 32.6, 4.9, 7.0), 6.25e9),
        Chip("v6e", 918e12, 1640e9, 31.25, 90e9, 2, 1.75e9, 256, 4096, (0.30, 0.44), (23.7, 52.8, 9.2, 11.9), 12.5e9),
        Chip("tpu7x", 1153e12, 3690e9, 94.75, 90e9, 3, 1.75e9, 256, 4096, (0.30, 0.44), (23.7, 52.8, 9.2, 11.9), 12.5e9, devices=2),
    )
}

# What JAX calls the devices → our names; by the runtime (or the compiler's topology) it is one or the other.
_DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


def chip_name(kind: str) -> str | None:
    """Our name (a key of `CHIPS`) of a JAX device's `device_kind`, None for chips that are not in the table, CPUs and GPUs."""
    return _DEVICE_KINDS.get(kind)


# (constant, source, confidence); printed with the results.
SOURCES = (
    ("peak", "Google Cloud's TPU pages (v5e, v5p, v6e), tpu7x: half of a chip", "high; v6e and tpu7x medium"),
    ("hbm_bandwidth", "Google Cloud's TPU pages (v5e, v5p); v6e, tpu7x commonly cited", "high; v6e and tpu7x medium"),
    ("hbm_limit", "compiler (libtpu 0.0.42): the size it refuses programs at", "high"),
    ("link", "commonly cited per-link figures, no primary source", "medium; tpu7x low"),
    ("network", "Google Cloud's TPU pages: a pod's, by its 256 chips (v5e, v6e); v5p commonly cited; tpu7x as v6e", "medium; v5p and tpu7x low"),
    ("clock", "derived: peak / (matrix units × their size)", "medium; v6e and tpu7x low"),
    ("vector", "public architecture descriptions: 8×128 lanes, 4 units, cores of the device", "low"),
    ("kernel", "static instruction counts of the splash kernel at 2,688 tokens, block 896, without stalls; tpu7x taken from v6e", "low"),
    ("own", "static instruction counts of the fused kernels at 28 frames and 120 words, without stalls; tpu7x taken from v6e", "low"),
)

_NAME = re.compile(r"(?:(\d+)x)?([a-z0-9]+):(\d+(?:x\d+){1,2})")


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of one chip and shape (in chips). name: as it was given; `slice_name`: of one slice, as the TPU compiler knows it."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """Without the number of slices."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.slices * math.prod(self.shape) * self.chip.devices


def parse_topology(name: str) -> Topology:
    """`v5p:4x4x4` or `2xv5p:4x4x4` → `Topology`. Raises `UserError` for an unknown chip or a malformed shape."""
    found = _NAME.fullmatch(name.strip())
    if not found:
        raise UserError(f"--topology={name} is not CHIP:AxB or CHIP:AxBxC, such as v5e:4x4, v5p:4x4x4, or 2xv5e:16x16 for two slices")
    slices, kind, shape = int(found[1] or 1), found[2], tuple(int(n) for n in found[3].split("x"))
    if kind not in CHIPS:
        raise UserError(f"--topology={name}: unknown chip {kind!r}; known ones are {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    if len(shape) != chip.torus or min(shape) < 1:
        example = {2: "4x4", 3: "2x2x1"}[chip.torus]
        raise UserError(f"--topology={name}: a {kind} slice has {chip.torus} dimensions of at least 1, such as {kind}:{example}")
    if slices < 1:
        raise UserError(f"--topology={name}: at least one slice")
    return Topology(name.strip(), chip, shape, slices)
