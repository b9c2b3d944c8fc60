"""What several op tests ask of an op."""
import contextlib
import os

import torch

GUARD = 64  # elements, a multiple of 16 bytes in every dtype


def store_error(dtype):
    """Relative error of a store in `dtype`: half an ulp; a whole one for bf16 in the interpreter, which truncates."""
    truncates = dtype == torch.bfloat16 and os.environ["IJEPA_KERNELS"] == "interpret"
    return torch.finfo(dtype).eps / (1 if truncates else 2)


@contextlib.contextmanager
def guarded_outputs(monkeypatch):
    """Every `torch.empty` inside lies between two guard bands, and is poisoned: NaN, or 77 in integers.

    A kernel that writes outside its output breaks a band, one that leaves an element unwritten leaves the poison.
    """
    empty, buffers = torch.empty, []

    def guarded_empty(*size, dtype=None, device=None):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or torch.get_default_dtype()
        buffer = empty(shape.numel() + 2 * GUARD, dtype=dtype, device=device)
        buffers.append(buffer.fill_(float("nan") if dtype.is_floating_point else 77))
        return buffer[GUARD : GUARD + shape.numel()].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded_empty)
        yield
    assert buffers, "nothing was allocated with torch.empty"
    for buffer in buffers:
        for band in (buffer[:GUARD], buffer[-GUARD:]):
            assert (band.isnan() if buffer.is_floating_point() else band == 77).all()


@contextlib.contextmanager
def forbidden_sync():
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_compiles_once(step, inputs):
    """`step(*args)` for each `args` of `inputs`: the compiled result and gradients equal eager ones, from one graph."""
    torch._dynamo.reset()
    # fullgraph=True forbids a second graph in a call, error_on_recompile another one for another call.
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for args in inputs:
            leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
            results = []
            for f in (compiled, step):
                out = f(*args)
                results.append((out, *torch.autograd.grad(out.sum(), leaves)))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
