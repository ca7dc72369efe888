"""What runs on older processors, in an emulator: the sets that they have, and the bits of the layers."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import foredraft
from foredraft.kernels import sets
from foredraft.kernels.layouts import FULL, QUANTIZED, TYPES, Memory, blocked, describe_weight
from foredraft.kernels.quantized import Quantized, laid_out
from foredraft.kernels.sets import using
from foredraft.models.native import run_linear
from instruction_sets import DTYPES, code_of
from test_plain_versions import in_order, made

pytestmark = pytest.mark.slow

EMULATOR, SCRIPT, PACKAGE = "qemu-x86_64", Path(__file__).parent / "old_processor.py", Path(foredraft.__file__).parent

PROCESSORS = {
    "Nehalem": "scalar",
    "SandyBridge": "scalar",
    "Haswell": "avx2",
    "Haswell,-avx2": "scalar",
    "Haswell,-fma": "scalar",
    "Haswell,-f16c": "scalar",
    "Haswell,-xsave": "scalar",
    "EPYC": "avx2",
    "Opteron_G5": "scalar",
}
"""Processors of the emulator, and the fastest set of each. Nehalem has no AVX, Sandy Bridge no AVX2. Opteron_G5 has FMA and
F16C, but no AVX2. Without XSAVE, the operating system does not save the registers of AVX2."""

ROWS, OUTPUTS, INPUTS = 7, 40, 96


class Layer(NamedTuple):
    """A layer as the script takes it, and its outputs by the scalar set and by torch, for every number of rows."""

    given: dict[str, Any]
    wanted: Tensor
    plain: Tensor | None


def layer_of(dtype: torch.dtype, bits: int) -> Layer:
    weight, x = made(OUTPUTS, INPUTS, dtype=dtype), made(ROWS, INPUTS, dtype=dtype, seed=1)
    bias = made(OUTPUTS, dtype=torch.float32, seed=2)
    described = describe_weight(_memory := Memory(), weight, bias, bits)
    numbers, scales, _ = laid_out(Quantized.of(weight)) if bits == QUANTIZED else (blocked(weight), torch.zeros(1), None)
    with using(code_of("scalar")):
        wanted = torch.cat([run_linear(described, x[:rows], 1) for rows in range(1, ROWS + 1)])
    plain = None
    if bits == FULL:
        plain = torch.cat([in_order(weight, bias, x[:rows]) for rows in range(1, ROWS + 1)])
    sizes = {"outputs": OUTPUTS, "inputs": INPUTS, "rows": ROWS, "type": TYPES[dtype], "weight_type": described.type}
    of_numbers = {name: getattr(described, name) for name in ("bits", "is_rounded", "form", "group", "scale_type")}
    sizes["of_numbers"] = of_numbers
    tensors = {"weight": numbers, "scales": scales, "bias": bias, "x": x}
    given = sizes | {name: hexadecimal(tensor) for name, tensor in tensors.items()}
    return Layer(given, wanted, plain)


def hexadecimal(tensor: Tensor) -> str:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()


def emulated(processor: str, layers: list[Layer]) -> dict[str, Any]:
    """What the script says on a processor. Skips the test where it cannot be emulated."""
    if platform.machine() != "x86_64" or not shutil.which(EMULATOR):
        pytest.skip(f"there is no {EMULATOR}, or Python here is not of its architecture")
    if not sets.LIBRARY.exists():
        pytest.skip("there are no compiled kernels")
    command = [EMULATOR, "-cpu", processor, sys.executable, str(SCRIPT), str(PACKAGE)]
    text = json.dumps([layer.given for layer in layers])
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_older_processor_takes_the_fastest_set_that_it_has(processor: str) -> None:
    """With the bits of every layer. torch runs by default where there is only the scalar set, and other sets are refused."""
    layers = [layer_of(dtype, bits) for dtype in DTYPES.values() for bits in (FULL, QUANTIZED)]
    told, best = emulated(processor, layers), PROCESSORS[processor]
    here = ["avx2", "scalar"] if best == "avx2" else ["scalar"]
    assert told["here"] == here
    assert told["given"].pop("auto") == ("avx2" if best == "avx2" else "torch")
    for name, found in told["given"].items():
        refused = f"FOREDRAFT_KERNELS is {name!r}, but this machine has {', '.join([*here, 'torch'])}. Give one of these"
        assert found == name if name in (*here, "torch") else found.startswith(refused)
    for found, layer in zip(told["layers"][best], layers, strict=True):
        outputs = torch.frombuffer(bytearray.fromhex(found), dtype=torch.float32).view(-1, OUTPUTS)
        assert torch.equal(outputs, layer.wanted)
        assert layer.plain is None or torch.equal(outputs, layer.plain)
