"""The benchmarks' own FLOP and byte formulas, against PyTorch's counter and the tensors that are read and written."""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import test_bench_attention, test_bench_inputs
from bench.harness.workload import MODELS, PREDICTOR_DIM
from bench.test_bench_attention import attention_case
from bench.test_bench_inputs import Inputs, embed_case, gather_case, predictor_case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for suite in (test_bench_attention, test_bench_inputs):
        monkeypatch.setattr(suite, "CPU_BATCH", 2)


def counted(call) -> int:
    # PyTorch's counter does not know the CPU's fused attention, so that is taken apart into its products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("collate", ["truncate", "ragged"])
@pytest.mark.parametrize("name", ["context80", "predictor24"])
def test_attention_flops_forward_and_backward(name, collate):
    case = attention_case(name, collate, CPU)
    assert case.flops == counted(case.variants["loop"].make())


def test_attention_flops_forward():
    case = attention_case("dense64", "truncate", CPU)
    for provider in ("loop", "batched", "materialised"):
        assert case.flops == counted(case.variants[provider].make())


@pytest.mark.parametrize(("name", "tensors"), [("context88", 12), ("dense64", 4)])
def test_attention_bytes(name, tensors):
    case = attention_case(name, "truncate", CPU)
    out, *_ = case.variants["loop"].make()()
    assert case.nbytes == tensors * out.nbytes


@pytest.mark.parametrize("collate", ["truncate", "ragged"])
@pytest.mark.parametrize("model", ["B16", "H14"])
def test_embedding(model, collate):
    data = Inputs(MODELS[model], collate, CPU)
    case = embed_case(data)
    call = case.variants["select"].make()
    assert case.flops == counted(call)
    out, weight_gradient, _ = call()
    pixels = out.shape[0] * 3 * data.patch**2
    assert case.nbytes == 2 * (pixels + out.nbytes + weight_gradient.nbytes)


def test_gathering_bytes():
    case = gather_case(Inputs(MODELS["H14"], "ragged", CPU))
    out = case.variants["select"].make()()
    assert case.nbytes == out.numel() + out.nbytes


@pytest.mark.parametrize("collate", ["truncate", "ragged"])
def test_predictor_tokens_bytes(collate):
    data = Inputs(MODELS["B16"], collate, CPU)
    case = predictor_case(data)
    out, context_gradient, _ = case.variants["select"].make()()
    positions = 4 * data.patches * PREDICTOR_DIM
    assert case.nbytes == 2 * (out.nbytes + context_gradient.nbytes) + positions


@pytest.mark.parametrize("collate", ["truncate", "ragged"])
@pytest.mark.parametrize("build", [gather_case, embed_case, predictor_case])
def test_the_gate_of_every_input_op(build, collate):
    case = build(Inputs(MODELS["B16"], collate, CPU))
    for provider in ("ours", "select"):
        result = case.variants[provider].make()()
        case.check(result)
        wrong = result[0] if isinstance(result, tuple) else result
        wrong[-1, -1] += 0.1 * wrong.abs().max()
        with pytest.raises(AssertionError, match="off by"):
            case.check(result)
