"""Says as JSON which instruction sets a processor has, which of them `FOREDRAFT_KERNELS` gives, and what layers compute there.

`test_old_processors.py` runs this script in an emulator. torch need not run on such a processor, so the script loads
`foredraft.kernels.sets` without the rest of the package, and uses Python's own modules only.
"""

import ctypes
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


def load_sets(package: Path) -> Any:
    """Imports `foredraft.kernels.sets`, without what `foredraft` and `foredraft.kernels` import themselves."""
    for name, folder in (("foredraft", package), ("foredraft.kernels", package / "kernels")):
        module = ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    return import_module("foredraft.kernels.sets")


def forced(sets: Any, name: str) -> str:
    """What `FOREDRAFT_KERNELS` gives: the name of a set, "torch", or the message of the error."""
    os.environ["FOREDRAFT_KERNELS"] = name
    sets.library.cache_clear()
    try:
        return str(sets.instruction_set())
    except sets.SetError as error:
        return str(error)


def outputs(sets: Any, name: str, layer: dict[str, Any]) -> str:
    """Runs a layer on every number of rows up to all, and returns the outputs in hexadecimal."""
    structures = import_module("foredraft.kernels.structures")
    parts = (ctypes.create_string_buffer(bytes.fromhex(layer[key])) for key in ("weight", "scales", "bias", "x"))
    weight, scales, bias, x = parts
    room = ctypes.create_string_buffer(layer["rows"] * layer["outputs"] * 4)
    sizes = layer["outputs"], layer["inputs"]
    described = structures.CLinear(ctypes.addressof(weight), layer["weight_type"], ctypes.addressof(bias), *sizes)
    for name, value in layer["of_numbers"].items():
        setattr(described, name, value)
    described.scales = ctypes.addressof(scales)
    found = []
    for rows in range(1, layer["rows"] + 1):
        given = ctypes.byref(described), layer["type"], ctypes.addressof(x), rows, ctypes.addressof(room), 2
        assert sets.code_of(name).linear(*given) == 0
        found.append(room.raw[: rows * layer["outputs"] * 4].hex())
    return "".join(found)


def main() -> None:
    """Reads the layers from the standard input, and the folder of the package from the command line."""
    sets = load_sets(Path(sys.argv[1]))
    here = sets.sets_here()
    told = {
        "here": here,
        "given": {name: forced(sets, name) for name in sets.KERNELS},
        "layers": {name: [outputs(sets, name, layer) for layer in json.load(sys.stdin)] for name in here[:1]},
    }
    print(json.dumps(told))


main()
