"""The sharding table of every preset against a golden copy, and the presets themselves.

After a wanted change: `python -m tests.test_parallel_table` writes the golden tables again; look at their diff.
"""

import pathlib

import pytest

from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.parallel.mesh import axis_sizes
from mila_jax.parallel.table import format_table, sharding_table

GOLDEN = pathlib.Path(__file__).parent / "golden_tables"
# preset, devices: the slice that the preset is laid out for
PRESETS = {"tiny": 1, "small": 8, "base": 16, "default": 64, "xl": 64, "xl128": 64, "v6e": 64}


def table_text(preset: str) -> str:
    """The formatted table of a preset on its slice."""
    config = load_config(f"configs/{preset}.py")
    return format_table(sharding_table(config, PRESETS[preset]), axis_sizes(config.mesh, PRESETS[preset]))


@pytest.mark.parametrize("preset", PRESETS)
def test_table_equals_its_golden_copy(preset):
    assert table_text(preset) == (GOLDEN / f"{preset}_{PRESETS[preset]}.txt").read_text(), "run python -m tests.test_parallel_table, look at the diff"


def test_every_preset_is_in_the_list():
    files = {p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")} - {"__init__", "demo", "stages"}
    assert files == set(PRESETS)


def test_table_adds_up():
    config = load_config("configs/xl.py")
    rows = {(r.group, r.name): r for r in sharding_table(config, 64)}
    total = {g: sum(r.mib for r in rows.values() if r.group == g) for g in ("parameters", "ema", "optimizer")}
    assert total["ema"] == total["parameters"] and total["optimizer"] == pytest.approx(2 * total["parameters"], rel=1e-4)
    kernel = rows["parameters", "pairs.spatial.mlp.fc1.kernel"]
    assert kernel.shape == (28, 1152, 4608) and kernel.physical == ((), ("fsdp",), ("tensor",))
    assert kernel.mib == 28 * 1152 / 32 * 4608 * 4 / 2**20
    stream = rows["activations", "stream, spatial block [b t v n d]"]
    assert stream.mib == 32 / 32 * 6 * 28 / 2 * 448 * 1152 * 2 / 2**20


def test_rules_and_mesh_of_the_config_show_in_the_table():
    config = load_config("configs/xl.py", ["--config.mesh.fsdp=8", "--config.mesh.tensor=4"])
    with config.unlocked():
        config.mesh.rules.embed = ("fsdp", "context")
    rows = {r.name: r for r in sharding_table(config, 64) if r.group == "parameters"}
    assert rows["pairs.spatial.mlp.fc1.kernel"].physical == ((), ("fsdp", "context"), ("tensor",))
    config.attention.parallel = "heads"
    config.mesh.rules.embed = ("fsdp",)
    rows = {r.name: r for r in sharding_table(config, 64)}
    assert rows["q, temporal attention [b v n t k e]"].physical == (("data", "fsdp"), (), (), (), ("tensor", "context"), ())


@pytest.mark.parametrize("key, value, match", [("mesh.context", 3, "mesh"), ("train.batch", 31, "train.batch"), ("mesh.tensor", 32, "model.heads")])
def test_sizes_that_do_not_divide_name_their_key(key, value, match):
    config = load_config("configs/xl.py")
    config.mesh.fsdp = 2 if key == "mesh.tensor" else config.mesh.fsdp
    config.mesh.context = 1 if key == "mesh.tensor" else config.mesh.context
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=match):
        sharding_table(config, 64)


def main() -> None:
    """Writes the golden tables."""
    GOLDEN.mkdir(exist_ok=True)
    for preset, devices in PRESETS.items():
        (GOLDEN / f"{preset}_{devices}.txt").write_text(table_text(preset))


if __name__ == "__main__":
    main()


def test_frozen_parameters_have_no_moments_and_bfloat16_halves_them():
    from mila_jax.config import load_config
    from mila_jax.parallel.table import sharding_table

    def optimizer(*overrides, stage=""):
        rows = sharding_table(load_config(f"configs/xl.py{stage}", overrides), 64)
        return sum(r.mib for r in rows if r.group == "optimizer"), sum(r.mib for r in rows if r.group == "parameters")

    (all_, parameters), (frozen, same), (halved, _) = optimizer(), optimizer(stage=":stage1"), optimizer("--config.train.moments=bfloat16")
    assert parameters == same and all_ == pytest.approx(2 * parameters, rel=1e-4) and halved == pytest.approx(all_ / 2, rel=1e-4)
    assert frozen < 0.25 * all_
