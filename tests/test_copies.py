"""Copies of weights in the dtype of the matrix products: the same numbers, never stale, never saved."""
import pytest
import torch
from ijepa_kernels import column_sum
from test_model import ragged, small_encoder

from ijepa_fast import blocks as parts_of_blocks
from ijepa_fast import compat
from ijepa_fast import copies as copied
from ijepa_fast.model import build_predictor, keep_copies
from ijepa_fast.optim import build_optimizer
from ijepa_fast.run import TrainState

CONTEXT, TARGET = ragged([20, 9], [0, 1]), ragged([4, 5], [0, 1])
IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))


def models(copies: bool):
    encoder = small_encoder(compute_dtype=torch.bfloat16)
    torch.manual_seed(0)
    predictor = build_predictor(encoder, depth=2, dim=48)
    for model in (encoder, predictor) if copies else ():
        keep_copies(model)
    return encoder, predictor


def gradients(encoder, predictor):
    predicted = predictor(encoder(IMAGES, CONTEXT), CONTEXT, TARGET)
    predicted.float().square().sum().backward()
    grads = {}
    for model in (encoder, predictor):
        grads |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
    return predicted.detach(), grads


@pytest.fixture(scope="module")
def plain():
    return gradients(*models(copies=False))


def assert_same(results, plain):
    assert torch.equal(results[0], plain[0])
    for name, grad in results[1].items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, plain[1][name]), name


def test_the_products_are_those_of_cast_weights(plain):
    assert_same(gradients(*models(copies=True)), plain)


def test_where_kernels_run_a_bias_is_summed_in_fp32_by_our_op(monkeypatch):
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, bias = (torch.zeros(*shape, requires_grad=True) for shape in ((24, 24), (24,)))
    out = copied.copied_linear(x, weight, bias, weight.bfloat16(), bias.bfloat16())
    exact, rounded = x.sum(0, dtype=torch.float32), x.sum(0).float()
    assert not torch.equal(exact, rounded)
    summed = []
    monkeypatch.setattr(copied, "column_sum", lambda grad: summed.append(grad.shape) or column_sum(grad))
    for runs, want in ((False, rounded), (True, exact)):
        monkeypatch.setattr(copied, "use_triton", lambda grad, runs=runs: runs)
        (got,) = torch.autograd.grad(out, bias, x, retain_graph=True)
        assert torch.equal(got, want)
        assert summed == [(300, 24)] * runs


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_on_a_gpu_what_comes_next_adds_the_biases(plain, checkpointing, monkeypatch):
    """Of proj, fc1 and fc2, the last ones in the next block; so their gradients come without a sum of their own."""
    encoder, predictor = models(copies=True)
    summed = []
    monkeypatch.setattr(parts_of_blocks, "use_triton", lambda x: True)
    monkeypatch.setattr(copied, "use_triton", lambda x: True)
    monkeypatch.setattr(copied, "column_sum", lambda grad: summed.append(grad.shape[1]) or grad.sum(0).float())
    for model, parts in ((encoder, encoder.blocks), (predictor, predictor.predictor_blocks)):
        for block in parts:
            block.checkpointing = checkpointing
            for part in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                torch.nn.init.normal_(part.bias, generator=torch.Generator().manual_seed(part.out_features))
        assert model.copies is not None
    predicted, grads = gradients(encoder, predictor)
    assert set(summed) == {3 * 96, 3 * 48, 48, 96}  # queries, keys and values; in and out of the predictor
    assert len(summed) == 2 + 2 + 2
    monkeypatch.undo()
    want, want_grads = gradients(encoder, predictor)
    assert float((predicted - want).norm() / want.norm()) < 2**-7  # a rounding to bf16 fewer
    for name, grad in grads.items():
        difference = (grad - want_grads[name]).norm() / want_grads[name].norm()
        assert difference < 0.03, (name, float(difference))


@pytest.mark.long  # compiles
def test_compiled_blocks_take_them_too(plain, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
    encoder, predictor = models(copies=True)
    for model, blocks in ((encoder, encoder.blocks), (predictor, predictor.predictor_blocks)):
        for block in blocks:
            block.compile()
        assert model.copies is not None
    assert_same(gradients(encoder, predictor), plain)


@torch.no_grad()
def test_a_changed_weight_is_rounded_again_and_no_other(monkeypatch):
    encoder = models(copies=True)[0]
    before, rounded = encoder(IMAGES, CONTEXT), []
    copy_ = compat.foreach_copy_
    monkeypatch.setattr(compat, "foreach_copy_", lambda to, of: rounded.append(len(to)) or copy_(to, of))
    assert torch.equal(encoder(IMAGES, CONTEXT), before)
    assert rounded == []
    encoder.blocks[1].mlp.fc2.weight.mul_(1.5)
    encoder.blocks[0].norm1.weight.mul_(1.5)  # has no copy
    assert not torch.equal(encoder(IMAGES, CONTEXT), before)
    assert rounded == [1]
    encoder.load_state_dict(models(copies=False)[0].state_dict())
    assert torch.equal(encoder(IMAGES, CONTEXT), before)


def test_an_update_is_seen():
    """PyTorch's fused AdamW changes weights without counting it (torch 2.13)."""
    encoder, predictor = models(copies=True)
    optimizer = build_optimizer(encoder, predictor)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    predictor(encoder(IMAGES, CONTEXT), CONTEXT, TARGET).float().square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        predictor(encoder(IMAGES, CONTEXT), CONTEXT, TARGET)
    for copies in (encoder.copies, predictor.copies):
        for weight, copy in zip(copies.weights, copies.copies, strict=True):
            assert torch.equal(weight.to(torch.bfloat16), copy)


def test_an_update_writes_all_copies(monkeypatch):
    encoder, predictor = models(copies=True)
    target = small_encoder(compute_dtype=torch.bfloat16).requires_grad_(False)
    keep_copies(target)
    state = TrainState(encoder, predictor, target, build_optimizer(encoder, predictor, target))
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
    predictor(encoder(IMAGES, CONTEXT), CONTEXT, TARGET).float().square().sum().backward()
    before = target.blocks[1].mlp.fc2.weight.clone()
    state.update(0.5)
    assert not torch.equal(target.blocks[1].mlp.fc2.weight, before)
    monkeypatch.setattr(compat, "foreach_copy_", None)  # nothing is left to round
    with torch.no_grad():
        target(IMAGES)
        predictor(encoder(IMAGES, CONTEXT), CONTEXT, TARGET)
    assert len(target.copies.weights) == 2 * (1 + 4 * 2)  # patch embedding, and four layers in each of two blocks
    for copies in (target.copies, encoder.copies, predictor.copies):
        for weight, copy in zip(copies.weights, copies.copies, strict=True):
            assert torch.equal(weight.to(torch.bfloat16), copy)


def test_they_are_no_part_of_the_state():
    with_copies, without = (models(copies)[0] for copies in (True, False))
    assert with_copies.state_dict().keys() == without.state_dict().keys()
    exact = small_encoder()
    keep_copies(exact)
    assert exact.copies is None  # the weights are in the products' dtype already
