"""What a new installation must do, in its own process; the last line says what was seen, as JSON.

    python .ci/check_installed.py [--with-compiler]

Import, a training step from logits and one from hidden states, on two threads of one runtime, with
no compiler on the path unless --with-compiler says that there may be one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time

import torch

start = time.process_time()
import tdpo_ext  # noqa: E402

import_seconds = time.process_time() - start
from tdpo_ext.token_statistics import native  # noqa: E402


def step_from_logits(model: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(x)
    return tdpo_ext.TDPOLoss()(logits, torch.randn_like(logits), labels).loss


def step_from_hidden(model: torch.nn.Linear, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    reference = torch.randn_like(model.weight)
    return tdpo_ext.LinearTDPOLoss()(x, model.weight, x.detach(), reference, labels).loss


def runtimes() -> list[str]:
    if sys.platform != "linux":
        return [os.path.basename(native.core.build_info()["openmp"])]
    with open("/proc/self/maps") as lines:
        paths = {line.split(None, 5)[5].strip() for line in lines if ".so" in line}
    names = ("libgomp", "libomp", "libiomp")
    return sorted(x for x in map(os.path.basename, paths) if x.startswith(names))


if "--with-compiler" not in sys.argv:
    assert shutil.which("c++") is None, "a compiler is on the path"
cpu = tdpo_ext.backends()["cpu"]
assert cpu["compiled"], cpu
assert cpu["openmp"], cpu
torch.set_num_threads(2)
model = torch.nn.Linear(32, 20000)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
labels = torch.randint(0, 20000, (4, 8))
for step in (step_from_logits, step_from_hidden):
    before = model.weight.detach().clone()
    optimizer.zero_grad()
    step(model, torch.randn(4, 8, 32), labels).backward()
    optimizer.step()
    assert bool(model.weight.isfinite().all())
    assert not torch.equal(before, model.weight)
assert len(runtimes()) == 1, runtimes()
assert native.core is not None
print(
    json.dumps(
        {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": tdpo_ext.backends()["cuda"].get("runtime", "no"),
            "openmp": os.path.basename(native.core.build_info()["openmp"]),
            "import_seconds": import_seconds,
        }
    )
)
