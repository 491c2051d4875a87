"""Loading a config file and changing single keys, with errors that name the nearest key."""

import difflib
import importlib.util
import pathlib

import ml_collections
from absl import flags
from ml_collections import config_flags

from mila_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
DEFAULT = "configs/tiny.py"


def _find(path) -> pathlib.Path:
    given = pathlib.Path(path)
    for candidate in (given, FOLDER.parent / given, FOLDER / given.name):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(f"configs/{p.name}" for p in FOLDER.glob("*.py") if p.name != "__init__.py"))
    raise UserError(f"config file {path} does not exist; shipped ones: {known}")


def _keys(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def load_config(path=DEFAULT, overrides=()) -> ml_collections.ConfigDict:
    """The config of file `path` (searched here, then beside the package) with overrides like `--config.train.steps=5`.

    Raises `UserError`: no such file, a file without get_config, an unknown key (with the nearest one), a value of a wrong type.
    """
    file = _find(path)
    spec = importlib.util.spec_from_file_location("mila_config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file} has no get_config() function; see configs/default.py")
    config = module.get_config()
    known = list(_keys(config))
    for argument in overrides:
        if argument.startswith("--config."):
            key = argument.removeprefix("--config.").split("=")[0]
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0.4) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
                hint = f"; did you mean config.{near[0]}?" if near else f"; sections are {', '.join(config)}"
                raise UserError(f"unknown config key {key!r}{hint}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["mila", *overrides])
    try:
        left = values(["mila", *overrides])[1:]
    except flags.Error as error:
        raise UserError(f"bad option: {str(error).splitlines()[0]}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"a config value has a wrong type: {error}") from None
    if left:
        raise UserError(f"unexpected argument {left[0]!r}")
    return values.config
