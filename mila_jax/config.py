"""Loading a config file and changing single keys, with errors that name the nearest key."""

import ast
import difflib
import importlib.util
import pathlib

import ml_collections
from absl import flags
from ml_collections import config_flags

from mila_jax.errors import UserError

SEEDS = 2**32  # a random key takes 32 bits: larger seeds would give what smaller ones give
FOLDER = pathlib.Path(__file__).parents[1] / "configs"


def _find(path) -> pathlib.Path:
    given = pathlib.Path(path)
    # A bare name or configs/NAME also finds the shipped file, wherever the command is run from; any other path is taken literally.
    shipped = [FOLDER / given.name] if given.parent in (pathlib.Path("."), pathlib.Path("configs")) else []
    for candidate in (given, *shipped):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(f"configs/{p.name}" for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "stages")))
    raise UserError(f"config file {path} does not exist; shipped ones: {known}")


def _keys(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def plain(value: str):
    """The value as Python would read it, else the text."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


RULE = "--config.mesh.rules."  # its keys are names of a table that most configs change nothing of


def load_config(path="configs/tiny.py", overrides=()) -> ml_collections.ConfigDict:
    """The config of file `path` (searched here, then beside the package) with overrides like `--config.train.steps=5`.

    `path` may end in `:stage1` to `:stage3`: the training stages of the paper, laid over the file's settings (configs/stages.py).

    Raises `UserError`: no such file, a file without get_config, an unknown key (with the nearest one), a value of a wrong type,
    a seed that no random key holds.
    """
    path, _, stage = str(path).partition(":")
    file = _find(path)
    if file.suffix != ".py":
        raise UserError(f"{file} is not a Python file; a config is a .py file with get_config(), see configs/default.py")
    spec = importlib.util.spec_from_file_location("mila_config_file", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
        if stage:
            from configs import stages

            config = stages.apply(config, stage)
    except Exception as error:  # it is the user's code: any mistake in it is theirs to see in one line
        raise UserError(f"{file} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"{file} has no get_config() that returns a ConfigDict; see configs/default.py")
    for argument in overrides:
        if argument.startswith(RULE):
            name, sign, value = argument.removeprefix(RULE).partition("=")
            if not sign or not name.isidentifier():
                raise UserError(f"{argument} is not {RULE}NAME=VALUE")
            with config.ignore_type():
                config.mesh.rules[name] = plain(value)
    overrides = [argument for argument in overrides if not argument.startswith(RULE)]
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
    seed = values.config.get("seed", 0)
    if not 0 <= seed < SEEDS:
        raise UserError(f"seed={seed} must lie between 0 and {SEEDS - 1}")
    return values.config
