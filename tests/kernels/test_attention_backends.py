"""Which backend varlen_attention takes, what it says about the others, how it calls a library."""
import itertools
import sys
import types

import pytest
import torch
from ijepa_kernels import attention_backends
from ijepa_kernels.attention import explain_backends, varlen_attention, varlen_attention_ref
from ijepa_kernels.attention_backends import BACKENDS, choose
from ijepa_kernels.attention_triton import HEAD_DIMS

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LIBRARIES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute", "flash_attn": "flash_attn"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("IJEPA_KERNELS", raising=False)
    attention_backends._choose.cache_clear()
    yield
    attention_backends._choose.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is an H100 and that no library is installed; gives a function that installs one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    monkeypatch.setattr(attention_backends, "INTERPRETED", False)
    monkeypatch.setattr(attention_backends, "MEASURED_FASTER", frozenset())
    for module in ("flash_attn_interface", "flash_attn", "flash_attn.cute", "xformers", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError

    def install(module, **contents):
        stub = types.ModuleType(module)
        vars(stub).update(contents)
        monkeypatch.setitem(sys.modules, module, stub)

    return install


def test_a_cpu_takes_plain_pytorch():
    assert choose(64, torch.float32, CPU) == "torch"
    text = explain_backends(80, device="cpu")
    assert text.startswith("head_dim 80, float32, cpu: auto takes torch\n")
    for name, backend in BACKENDS.items():
        assert f"  {name} " in text
        assert backend.what in text
    assert "FlashAttention-3: cannot be used: runs on CUDA devices only" in text
    assert text.endswith("plain PyTorch; reads the lengths on the host: taken")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_explains_a_device_that_is_not_there():
    text = explain_backends(88, torch.bfloat16, "cuda")
    assert text.startswith("head_dim 88, bfloat16, cuda (no such device here): auto takes torch\n")
    assert text.count("cannot be used: there is no CUDA device") == 5 + (not attention_backends.INTERPRETED)


def test_order_on_a_gpu(gpu, monkeypatch):
    assert choose(80, torch.bfloat16, CUDA) == "torch_varlen"
    assert choose(80, torch.float32, CUDA) == "triton"
    gpu("flash_attn.cute")
    attention_backends._choose.cache_clear()
    assert choose(64, torch.bfloat16, CUDA) == "fa4"
    assert choose(80, torch.bfloat16, CUDA) == "torch_varlen"  # its backward is in doubt there
    monkeypatch.setattr(attention_backends, "MEASURED_FASTER", frozenset({(80, torch.bfloat16, 9)}))
    attention_backends._choose.cache_clear()
    assert choose(80, torch.bfloat16, CUDA) == "triton"
    gpu("flash_attn_interface")
    attention_backends._choose.cache_clear()
    assert choose(80, torch.bfloat16, CUDA) == "fa3"


def test_wide_heads_in_fp32_go_to_a_backend_that_does_not_spill(gpu):
    assert choose(96, torch.float32, CUDA) == "triton"
    assert choose(128, torch.float32, CUDA) == "torch"
    assert choose(128, torch.bfloat16, CUDA, "triton") == "triton"


def test_explains_a_gpu(gpu):
    gpu("flash_attn.cute")
    text = explain_backends(88)
    assert text.splitlines() == [
        "head_dim 88, bfloat16, cuda (H100, sm_90): auto takes torch_varlen",
        "  fa3           FlashAttention-3: cannot be used: flash_attn_interface is not installed",
        "  fa4           FlashAttention-4: cannot be used: "
        "its sm_90 backward is in doubt where head_dim is no multiple of 32",
        "  torch_varlen  torch.nn.attention.varlen: taken",
        "  flash_attn    FlashAttention-2: cannot be used: flash_attn is not installed",
        "  xformers      xformers; waits for the device to read the lengths: "
        "cannot be used: xformers.ops.fmha is not installed",
        "  triton        our kernel: usable; no measurement says that it is the fastest here",
        "  torch         plain PyTorch; reads the lengths on the host: usable",
        "without gradients, all sequences max_seqlen long: one call of scaled_dot_product_attention",
    ]


def test_a_broken_library_is_passed_over(gpu, monkeypatch, tmp_path):
    broken = {"flash_attn_interface": "raise RuntimeError('undefined symbol')", "flash_attn": "import tqwv"}
    for name, line in broken.items():
        (tmp_path / f"{name}.py").write_text(line)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    text = explain_backends(64)
    assert "auto takes torch_varlen" in text
    assert "FlashAttention-3: cannot be used: flash_attn_interface does not import: undefined symbol" in text
    assert "FlashAttention-2: cannot be used: flash_attn needs tqwv" in text


@pytest.mark.parametrize(("mode", "taken"), [("torch", "torch"), ("triton", "triton")])
def test_environment_decides_for_auto_alone(mode, taken, gpu, monkeypatch):
    assert attention_backends.takes_one_call(64, torch.bfloat16, CUDA, 8, 2, 4)
    monkeypatch.setenv("IJEPA_KERNELS", mode)
    assert not attention_backends.takes_one_call(64, torch.bfloat16, CUDA, 8, 2, 4)
    assert choose(64, torch.bfloat16, CUDA) == taken
    assert choose(64, torch.bfloat16, CUDA, "torch_varlen") == "torch_varlen"
    assert f"(IJEPA_KERNELS={mode})" in explain_backends(64)


def test_what_cannot_be_used_is_an_error(gpu, monkeypatch):
    with pytest.raises(ValueError, match=r"torch_varlen .* cannot be used for .*, float32 on cuda: takes bfloat16 and"):
        choose(64, torch.float32, CUDA, "torch_varlen")
    with pytest.raises(ValueError, match=r"backend: triton .* head_dim 136, .*: takes head dims up to 128 in bfloat16"):
        choose(136, torch.bfloat16, CUDA, "triton")
    with pytest.raises(ValueError, match=r"backend: triton .* head_dim 104, .*: takes head dims up to 96 in float32"):
        choose(104, torch.float32, CUDA, "triton")
    with pytest.raises(ValueError, match=r"backend: want auto or one of fa3, fa4, .*, got 'fastest'"):
        choose(64, torch.float32, CPU, "fastest")
    monkeypatch.setenv("IJEPA_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"IJEPA_KERNELS must be one of auto, .*, got 'fast'"):
        choose(64, torch.float32, CPU)


@pytest.mark.parametrize("name", LIBRARIES)
def test_calls_a_library_by_its_argument_names(name, gpu):
    seen = {}

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, softmax_scale, **rest):
        seen.update(rest)
        out = varlen_attention_ref(q, k, v, cu_seqlens_q, softmax_scale)
        return (out, "lse") if name == "fa4" else out

    gpu(LIBRARIES[name], flash_attn_varlen_func=flash_attn_varlen_func)
    q, k, v = torch.randn(3, 7, 2, 16, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    out = BACKENDS[name].call(q, k, v, ends, 9, 0.5)
    assert torch.equal(out, varlen_attention_ref(q, k, v, ends, 0.5))
    assert seen.pop("cu_seqlens_k") is ends
    assert seen == {"max_seqlen_q": 9, "max_seqlen_k": 9, "deterministic": False}


def test_compiler_sees_the_library_call(monkeypatch):
    """torch.nn.attention.varlen in one graph, the choice made while tracing; on a CPU it can only be traced."""
    usable = BACKENDS["torch_varlen"]._replace(why_not=lambda case: None)
    monkeypatch.setitem(BACKENDS, "torch_varlen", usable)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return lambda *args: (args[0],)

    def step(qkv, cu_seqlens):
        return varlen_attention(*qkv.unbind(1), cu_seqlens, 8, backend="torch_varlen")

    torch._dynamo.reset()
    qkv, ends = torch.zeros(12, 3, 2, 24, dtype=torch.bfloat16), torch.tensor([0, 5, 7, 9, 12], dtype=torch.int32)
    torch.compile(step, backend=backend, fullgraph=True, dynamic=True)(qkv, ends)
    assert "torch_attn._varlen_attn" in targets


@pytest.mark.parametrize(("dtype", "device", "tokens", "sequences", "bound"), [
    (torch.bfloat16, CUDA, 8, 2, 5), (torch.bfloat16, CUDA, 0, 0, 4), (torch.bfloat16, CUDA, 8, 3, 4),
    (torch.float32, CUDA, 8, 2, 4), (torch.bfloat16, CPU, 8, 2, 4),
])
def test_one_call_is_for_16_bits_on_a_gpu_and_equal_lengths(dtype, device, tokens, sequences, bound):
    assert not attention_backends.takes_one_call(64, dtype, device, tokens, sequences, bound)


def test_one_call_gives_way_to_flash_attention_3(gpu):
    gpu("flash_attn_interface")
    assert not attention_backends.takes_one_call(64, torch.bfloat16, CUDA, 8, 2, 4)


def test_an_xformers_without_operators_is_passed_over(gpu, monkeypatch):
    def memory_efficient_attention(*_):
        raise NotImplementedError("No operator found")

    gpu("xformers", ops=None)
    gpu("xformers.ops", fmha=None)
    gpu("xformers.ops.fmha", memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(sys.modules["xformers.ops"], "fmha", sys.modules["xformers.ops.fmha"])
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **rest: zeros(*shape, **rest))
    assert "xformers; waits for the device to read the lengths: cannot be used: it has no op" in explain_backends(64)


def test_one_call_over_equal_lengths_is_attention_inside_each():
    qkv = torch.randn(12, 3, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    out = attention_backends.one_call(*qkv.unbind(1), 4, 0.3)
    torch.testing.assert_close(out, varlen_attention_ref(*qkv.unbind(1), ends, 0.3), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "bound", "one"), [(392, 196, True), (392, 256, False), (391, 196, False)])
def test_whole_images_without_gradients_take_one_call(tokens, bound, one, monkeypatch):
    qkv, _, ends = sample([tokens - 196, 196], 4, 80, torch.bfloat16)
    calls, call = [], attention_backends.one_call
    monkeypatch.setattr(attention_backends, "one_call", lambda *x: calls.append(x) or call(*x))
    out = varlen_attention(*qkv.unbind(1), ends, bound)
    assert bool(calls) == one
    exact = varlen_attention_ref(*qkv.double().unbind(1), ends)
    assert (out.double() - exact).abs().max() <= 2**-7 * exact.abs().max()  # as in test_attention
    varlen_attention(*qkv.requires_grad_().unbind(1), ends, bound)
    assert len(calls) == one


def sample(lengths, heads, head_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator).to("cuda", dtype)
    grad = torch.randn(sum(lengths), heads, head_dim, generator=generator).to("cuda", dtype)
    return qkv, grad, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def results(attention, qkv, grad, *args, **kwargs):
    qkv = qkv.detach().requires_grad_()
    out = attention(*qkv.unbind(1), *args, **kwargs)
    out.backward(grad)
    return out.detach(), qkv.grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_backends_agree(head_dim, dtype):
    """Each backend errs at most twice as much as dense PyTorch in the same dtype does (and an ulp), against float64."""
    qkv, grad, ends = sample([1, 256, 63, 0, 784, 196, 64], 4, head_dim, dtype)
    exact = results(varlen_attention_ref, qkv.double(), grad.double(), ends)
    dense = results(varlen_attention_ref, qkv, grad, ends)
    for name in BACKENDS:
        if BACKENDS[name].why_not(attention_backends._Case(head_dim, dtype, qkv.device)):
            continue
        ours = results(varlen_attention, qkv, grad, ends, 784, backend=name)
        for actual, d, e in zip(ours, dense, exact, strict=True):
            allowed = 2 * (d.double() - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()
            assert (actual.double() - e).abs().max() <= allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch_varlen", "triton"])
def test_compiled_for_a_gpu(backend):
    def step(qkv, ends):
        return varlen_attention(*(qkv * 2).unbind(1), ends, 256, backend=backend) * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([3, 256, 17, 60], [100] * 9, [1, 250]):
            qkv, grad, ends = sample(lengths, 4, 80, torch.bfloat16)
            for actual, expected in zip(
                results(lambda *x: compiled(torch.stack(x[:3], 1), x[3]), qkv, grad, ends),
                results(lambda *x: step(torch.stack(x[:3], 1), x[3]), qkv, grad, ends),
                strict=True,
            ):
                # Inductor may keep `* 2` and `* 3` in fp32 where eager rounds; both are exact in binary but for * 3.
                torch.testing.assert_close(actual, expected, atol=1e-2, rtol=2**-7)
