"""`python -m mila_jax.parity FILE.npz …`: prints the largest absolute error of each output; exit code 1 above tolerance."""

import sys
import zipfile
from pathlib import Path

import numpy as np

from mila_jax.errors import UserError
from mila_jax.runtime import setup


def check_file(path) -> list[tuple[str, float, float]]:
    """(output, largest error, tolerance) of one file; the format is recognised by its keys.

    Raises `UserError` if the file cannot be read or is of no known format.
    """
    from mila_jax.parity import autoencoder_kl, rflow, stdit3, vae_temporal

    try:
        with np.load(path, allow_pickle=False) as z:
            npz = {k: z[k] for k in z.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give an .npz file of recorded numbers") from None
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{path} is not a readable .npz file ({error}); get it again") from None
    if stdit3.matches(npz):
        return stdit3.check(npz, Path(path).parent)
    for format_ in (autoencoder_kl, rflow, vae_temporal):
        if format_.matches(npz):
            return format_.check(npz)
    raise UserError(
        f"{path} is of no known format (STDiT3, AutoencoderKL, temporal autoencoder or rectified flow); its keys start with {sorted(npz)[:3]}"
    )


def main(paths) -> int:
    """Checks every file; returns the exit code (0 all within tolerance, 1 some above, 2 bad input)."""
    if not paths:
        print("usage: python -m mila_jax.parity FILE.npz …", file=sys.stderr)
        return 2
    worst = 0
    for path in paths:
        try:
            results = check_file(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (KeyError, ValueError, IndexError) as error:
            print(f"error: {path} does not hold what its format asks for: {type(error).__name__} {error}", file=sys.stderr)
            return 2
        for name, error, tolerance in results:
            good = error <= tolerance  # False for NaN too
            print(f"{path}: {name}: largest error {error:.3g} (tolerance {tolerance:g}) {'ok' if good else 'ABOVE TOLERANCE'}")
            worst |= not good
    return int(worst)


if __name__ == "__main__":
    setup()
    sys.exit(main(sys.argv[1:]))
