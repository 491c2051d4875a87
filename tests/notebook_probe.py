"""Executes the code cells of a notebook in order, as a kernel would: `python -m tests.notebook_probe NOTEBOOK VALUES.json SHOWN.json`.

VALUES replace the names of the cell tagged `parameters`. What the cells display is written to SHOWN. IPython is stood in for by the two names that
the notebook takes from it, so that no kernel has to be installed.
"""

import json
import pathlib
import sys
import types


def main() -> None:
    notebook, values, shown = (pathlib.Path(a) for a in sys.argv[1:])
    displayed = []
    module = types.ModuleType("IPython.display")
    module.HTML, module.display = str, displayed.append
    sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": module}
    names = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            replaced = json.loads(values.read_text())
            assert replaced.keys() <= names.keys(), f"the notebook has no {replaced.keys() - names.keys()}"
            names |= replaced
        sys.stdout.flush()
    shown.write_text(json.dumps(displayed))


if __name__ == "__main__":
    main()
