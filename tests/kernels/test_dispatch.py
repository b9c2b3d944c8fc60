"""IJEPA_KERNELS: what it chooses at each call and, in other processes, what it does at import."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ijepa_kernels import compat, dispatch, registration
from torch._subclasses.fake_tensor import FakeTensorMode

STEP = """
import os, torch
from ijepa_kernels import Packed, dispatch, ema_update_, smooth_l1_loss
packed = Packed.from_masks([torch.tensor([[0, 2], [1, 3]])], 4)
pred = torch.arange(12.0).view(4, 3).requires_grad_()
loss = smooth_l1_loss(pred, torch.arange(24.0).view(2, 4, 3), packed, normalize=False)
loss.backward()
assert loss.item() == 5.625  # rows off by 0, 3, 9, 12: (0 + 2.5 + 8.5 + 11.5) / 4
target = [torch.ones(3)]
ema_update_(target, [torch.zeros(3)], 0.5)
assert target[0].tolist() == [0.5, 0.5, 0.5]
"""


GPU_BUILD = "import torch\ntorch.version.cuda = '13.0'\n"
CPU_BUILD = "import torch\ntorch.version.cuda = torch.version.hip = None\n"
# At import: what runs, and the environment that it runs in. Without triton is as on Windows and macOS.
IMPORTS = {
    "interpret": (STEP + "assert dispatch.INTERPRETED", {"IJEPA_KERNELS": "interpret"}),
    "interpret, triton imported before": ("import triton\n" + STEP, {"IJEPA_KERNELS": "interpret"}),
    "light": ("import sys, ijepa_kernels\nassert 'torch._dynamo' not in sys.modules", {}),
    "for CPUs alone": (CPU_BUILD + STEP + "import sys\nassert 'triton' not in sys.modules", {}),
    "for CPUs alone, asked for it": (CPU_BUILD + STEP + "assert dispatch.HAS_TRITON", {"TRITON_INTERPRET": "1"}),
    "for CPUs alone, triton too late": (
        CPU_BUILD + "import ijepa_kernels, os\nos.environ['IJEPA_KERNELS'] = 'triton'\n" + STEP, {}),
    "for CPUs alone, interpret too late": (
        CPU_BUILD + "import ijepa_kernels, os\nos.environ['IJEPA_KERNELS'] = 'interpret'\n" + STEP, {}),
    "without triton": (GPU_BUILD + "import sys\nsys.modules['triton'] = None\n" + STEP, {}),
    "without triton, asked for it": ("import sys\nsys.modules['triton'] = None\n" + STEP, {"IJEPA_KERNELS": "triton"}),
}
# A fork for each: what costs time is to import torch, which they share.
FORKS = """
import json, os, sys, traceback, torch
assert not any(name.partition(".")[0] in ("triton", "ijepa_kernels") for name in sys.modules)
for code, environment in json.load(sys.stdin):
    if not os.fork():
        os.environ.update(environment)
        try:
            exec(code, {})
            print("done", flush=True)
        except Exception:
            print(traceback.format_exc(), flush=True)
        os._exit(0)
    os.wait()
    print("-----", flush=True)
"""


@pytest.fixture(scope="module")
def imports() -> dict[str, str]:
    """The last line that each of IMPORTS left: "done" or its error."""
    clean = {k: v for k, v in os.environ.items() if k not in ("IJEPA_KERNELS", "TRITON_INTERPRET")}
    script, jobs = [sys.executable, "-c", FORKS], json.dumps(list(IMPORTS.values()))
    result = subprocess.run(script, input=jobs, env=clean, capture_output=True, text=True, timeout=300, check=True)
    outputs = result.stdout.split("-----\n")[:-1]
    return {name: out.strip().splitlines()[-1] for name, out in zip(IMPORTS, outputs, strict=True)}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("interpret", "done"),
        ("interpret, triton imported before", "ValueError: IJEPA_KERNELS=interpret needs CPU tensors and must be set"),
        ("light", "done"),
        ("for CPUs alone", "done"),
        ("for CPUs alone, asked for it", "done"),
        ("for CPUs alone, triton too late", "ValueError: IJEPA_KERNELS=triton needs CUDA tensors and compiled kernels"),
        ("for CPUs alone, interpret too late", "ValueError: IJEPA_KERNELS=interpret needs CPU tensors and must be set"),
        ("without triton", "done"),
        ("without triton, asked for it", "ValueError: IJEPA_KERNELS=triton, but triton is not installed"),
    ],
)
def test_at_import(imports, name, says):
    assert imports[name].startswith(says)


def test_the_mode_is_read_at_every_call(monkeypatch):
    x = torch.zeros(1)
    for mode, answer in (("torch", False), ("interpret", True), ("auto", False)):
        monkeypatch.setenv("IJEPA_KERNELS", mode)
        assert dispatch.use_triton(x) is answer


@pytest.mark.parametrize(
    ("mode", "interpreted", "says"),
    [
        ("fast", True, "IJEPA_KERNELS must be one of auto, torch, triton, interpret, got 'fast'"),
        ("triton", True, "IJEPA_KERNELS=triton needs CUDA tensors and compiled kernels, .* under TRITON_INTERPRET=1"),
        ("triton", False, "IJEPA_KERNELS=triton needs CUDA tensors and compiled kernels, .* to tensors on cpu"),
    ],
)
def test_modes_that_cannot_run_say_so(monkeypatch, mode, interpreted, says):
    monkeypatch.setenv("IJEPA_KERNELS", mode)
    monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
    with pytest.raises(ValueError, match=says):
        dispatch.use_triton(torch.zeros(1))


def test_plain_eager_sees_modes_and_compilers():
    assert registration.is_plain_eager()
    with FakeTensorMode():
        assert not registration.is_plain_eager()
    torch._dynamo.reset()
    step = torch.compile(lambda: torch.tensor(registration.is_plain_eager()), backend="eager", fullgraph=True)
    assert not step()


def test_a_compiler_does_not_trace_what_is_assumed_constant():
    @compat.assume_constant_result
    def two() -> int:
        torch._dynamo.graph_break()  # an error where it is traced
        return 2

    torch._dynamo.reset()
    assert torch.compile(lambda x: x * two(), backend="eager", fullgraph=True)(torch.ones(1)).item() == 2


def test_private_names_of_pytorch_stand_in_compat():
    package = Path(dispatch.__file__).parent
    found = {file.name for file in package.glob("*.py") if re.search(r"\btorch\.(_|ops\.aten)", file.read_text())}
    assert found == {"compat.py"}


def test_what_compat_says_to_do_when_a_function_moves_computes_the_same():
    pred, target, grad = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0))
    upstream, softmax = torch.tensor(0.3), pred.softmax(-1)
    pairs = [(compat.softmax_backward(grad, softmax), softmax * (grad - (softmax * grad).sum(-1, keepdim=True)))]
    for private, fallback in (
        (compat.mse_loss_backward_, lambda out: torch.sub(pred, out, out=out).mul_(2 * upstream)),
        (
            lambda *x: compat.smooth_l1_loss_backward_(*x, 0.7),
            lambda out: torch.sub(pred, out, out=out).div_(0.7).clamp_(-1, 1).mul_(upstream),
        ),
    ):
        a, b = target.clone(), target.clone()
        private(upstream, pred, a)
        fallback(b)
        pairs.append((a, b))
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # a rounding or two of numbers of order 1


def test_kernels_is_a_source_root_and_no_package():
    """A regular package `kernels` in the working folder would shadow Hugging Face's and break `import transformers`."""
    root = os.path.dirname(os.path.dirname(dispatch.__file__))
    assert os.path.basename(root) == "kernels"
    assert not os.path.exists(os.path.join(root, "__init__.py"))
