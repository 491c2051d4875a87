"""What the command line hands on: each option reaches the function that does the work, under its own name."""

import pytest

from mila_jax import cli
from mila_jax.errors import UserError
from mila_jax.export import parse_size

CASES = [
    ("export a b --format=nuscenes --size=900x1600 --out=o", "mila_jax.export.export_command", (["a", "b"], "o"), dict(format_="nuscenes", size=(900, 1600))),
    ("export a --format=act-bench --out=o", "mila_jax.export.export_command", (["a"], "o"), dict(format_="act-bench", size=None)),
    ("drift a b --motion --out=o", "mila_jax.drift_command.drift_command", (["a", "b"], "o"), dict(motion=True)),
    ("ablate --clips=3 --long=2.5 --out=o", "mila_jax.ablate.ablate_command", ("o",), dict(clips=3, long_seconds=2.5)),
    ("prepare --part=2/3", "mila_jax.prepare.prepare", (), dict(part="2/3", beam=None)),
    (
        "evaluate --preset=mila-600 --clips=5 --network=effnet@112 --windows=0-1 --motion=front --lpips --dino=d --clip=c --amt=a --out=o",
        "mila_jax.preset_scores.preset_command", ("mila-600", "o"),
        dict(networks=["effnet@112"], limit=5, windows="0-1", motion="front", lpips=True, dino="d", clip="c", amt="a"),
    ),
    ("evaluate --clips=2 --seconds=3 --out=o", "mila_jax.scores.evaluate_command", (), dict(clips=2, seconds=3.0, out="o", lpips=False)),
]  # fmt: skip


@pytest.mark.parametrize(
    "command, target, arguments, settings", CASES, ids=[case[0].split(" --")[0] + str(number) for number, case in enumerate(CASES)]
)
def test_options_reach_what_they_are_for(monkeypatch, capsys, command, target, arguments, settings):
    got = []
    monkeypatch.setattr(target, lambda config, *args, **kwargs: got.append((config, args, kwargs)) or [])
    assert cli.main([*command.split(), "--quiet", "--config.seed=7"]) == 0, capsys.readouterr().err
    [(config, args, kwargs)] = got
    assert config.seed == 7 and tuple(args) == arguments
    assert kwargs.pop("progress", False) is False and kwargs == settings


def test_report_takes_two_folders(monkeypatch, capsys):
    monkeypatch.setattr("mila_jax.preset_report.report_command", lambda *folders: "|".join(map(str, folders)))
    assert cli.main(["report", "a", "b", "--out=o"]) == 0 and capsys.readouterr().out == "a|b|o\n"


def test_sizes_of_pictures():
    assert parse_size("900x1600") == (900, 1600)
    for text in ("900", "900x", "9x16", "axb"):
        with pytest.raises(UserError, match="HEIGHTxWIDTH"):
            parse_size(text)
