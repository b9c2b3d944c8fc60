"""IJEPA_KERNELS: what it chooses at each call and, in processes of their own, what it does at import."""
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


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("IJEPA_KERNELS", "TRITON_INTERPRET")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_interpret_needs_no_other_setting():
    result = run(STEP + "assert dispatch.INTERPRETED", IJEPA_KERNELS="interpret")
    assert result.returncode == 0, result.stderr


@pytest.mark.long
def test_interpret_after_triton_was_imported_says_so():
    result = run("import triton\n" + STEP, IJEPA_KERNELS="interpret")
    assert "ValueError: IJEPA_KERNELS=interpret needs CPU tensors and must be set before" in result.stderr


@pytest.mark.long
def test_without_triton():
    """As on Windows and macOS: the package imports, auto runs PyTorch, and asking for Triton says what is missing."""
    asks = "\nos.environ['IJEPA_KERNELS'] = 'triton'\nema_update_(target, target, 0.5)"
    result = run("import sys; sys.modules['triton'] = None\n" + STEP + "print('done')" + asks)
    assert result.stdout == "done\n", result.stderr
    assert "ValueError: IJEPA_KERNELS=triton, but triton is not installed" in result.stderr


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
