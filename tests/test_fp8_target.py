"""The target encoder in e4m3: what is rounded, how far features move, and that weights are never stale."""
import copy

import pytest
import torch
from safetensors.torch import load_file
from test_model import small_encoder
from torch import nn

from ijepa_fast import fp8
from ijepa_fast.errors import UserError
from ijepa_fast.fp8 import check_fp8, use_fp8
from ijepa_fast.model import VisionTransformer, build_predictor, keep_copies
from ijepa_fast.optim import build_optimizer
from ijepa_fast.run import TrainState

IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
ROWS = torch.tensor([3, 40, 60])


TABLES = {
    "row": {},
    "tensor": {"qkv": "tensor", "fc1": "tensor"},
    "fc1 alone": {"qkv": None, "fc2": None},
    "fc2 alone": {"qkv": None, "fc1": None},
}
by_tables = pytest.mark.parametrize("table", TABLES, indirect=True)


@pytest.fixture
def table(request, monkeypatch):
    """`SCALES` as the test asks for them."""
    for product, scales in TABLES[request.param].items():
        monkeypatch.setitem(fp8.SCALES, product, scales)
    return request.param


def quantised(blocks="all", compute_dtype=torch.float32, copies=True) -> VisionTransformer:
    encoder = small_encoder(compute_dtype=compute_dtype).requires_grad_(False)
    use_fp8(encoder, blocks)
    if copies:
        keep_copies(encoder)
    return encoder


def relative(a, b):
    return float((a - b).norm() / b.norm())


def products(block):
    return {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}


@by_tables
def test_the_table_says_which_products_are_of_e4m3(table):
    for block in quantised().blocks:
        got = {name: layer.fp8 for name, layer in products(block).items()}
        assert got == {"qkv": "row", "proj": None, "fc1": "row", "fc2": "row"} | TABLES[table]
        for layer in products(block).values():
            assert (layer.quantized is None) == (layer.fp8 is None)
            if layer.quantized is not None:
                assert layer.quantized.scale.shape == (len(layer.weight) if layer.fp8 == "row" else 1, 1)


@pytest.mark.parametrize("product", ["proj", "fc2"])
def test_the_table_has_no_scales_that_nothing_writes(product, monkeypatch):
    monkeypatch.setitem(fp8.SCALES, product, "tensor")
    with pytest.raises(AssertionError):
        use_fp8(small_encoder(), "all")


@torch.no_grad()
@by_tables
def test_features_move_by_what_four_bits_explain(table):
    """Each factor of a product is off by 2^-4 / sqrt(3) of itself in the root mean square, at most, 3.6 %; rounded to
    bf16, 16 times finer, by a sixteenth of that."""
    plain, low, rounded = small_encoder(), quantised(), small_encoder(compute_dtype=torch.bfloat16)
    for encoder in (plain, low, rounded):
        for block in encoder.blocks:
            for part in products(block).values():
                part.weight.mul_(5)  # as drawn, they add little to the stream
                part.bias.copy_(torch.linspace(-1, 1, len(part.bias)))
    want = plain(IMAGES)
    assert relative(rounded(IMAGES), want) < 0.5 * relative(low(IMAGES), want) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_tables
def test_kept_weights_are_those_rounded_at_every_call(dtype, table):
    """As FSDP, which keeps none, rounds them."""
    kept, anew = quantised(compute_dtype=dtype), quantised(compute_dtype=dtype, copies=False)
    assert torch.equal(kept(IMAGES), anew(IMAGES))
    assert torch.equal(kept(IMAGES, rows=ROWS), anew(IMAGES, rows=ROWS))


@pytest.fixture
def rounded(monkeypatch):
    """The weights that were rounded in a pass of their own, in turn."""
    weights = []
    for name in ("quantize_rows", "quantize_tensor"):
        quantize = getattr(fp8, name)
        monkeypatch.setattr(fp8, name, lambda x, out, quantize=quantize: weights.append(x) or quantize(x, out))
    return weights


@torch.no_grad()
@pytest.mark.parametrize("table", ["row", "tensor"], indirect=True)
def test_a_changed_weight_is_rounded_again_into_its_place(table, rounded):
    encoder = quantised()
    before = encoder(IMAGES)
    assert torch.equal(encoder(IMAGES), before)
    assert len(rounded) == 6  # three weights of each block, once
    for number, layer in enumerate((encoder.blocks[1].mlp.fc2, encoder.blocks[1].attn.qkv)):
        held = layer.quantized.values.data_ptr(), layer.quantized.scale.data_ptr()
        layer.weight.mul_(1.5)
        changed = encoder(IMAGES)
        assert len(rounded) == 7 + number
        assert not torch.equal(changed, before)
        assert (layer.quantized.values.data_ptr(), layer.quantized.scale.data_ptr()) == held
        fresh = small_encoder().requires_grad_(False)
        fresh.load_state_dict(encoder.state_dict())
        use_fp8(fresh, "all")  # without kept weights
        assert torch.equal(fresh(IMAGES), changed)


@pytest.mark.parametrize("table", ["row", "tensor"], indirect=True)
def test_after_an_update_the_next_forward_rounds_what_has_one_scale(table, rounded):
    """The rest the optimizer has rounded; either way the target encoder computes with the weights that it has."""
    target = quantised()
    encoder = small_encoder()
    predictor = build_predictor(encoder, depth=1, dim=48)
    state = TrainState(encoder, predictor, target, build_optimizer(encoder, predictor, target))
    before = target(IMAGES)
    for step in range(2):
        rounded.clear()
        for number, p in enumerate(p for model in (encoder, predictor) for p in model.parameters() if p.requires_grad):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
        for group in state.optimizer.param_groups:
            group["lr"] = 0.01
        state.update(0.5)
        after = target(IMAGES)
        names = {id(p): name for name, p in target.named_parameters()}
        want = [f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "mlp.fc1")]
        assert sorted(names[id(weight)] for weight in rounded) == (want if table == "tensor" else [])
        assert not torch.equal(after, before)
        fresh = small_encoder().requires_grad_(False)
        fresh.load_state_dict(target.state_dict())
        use_fp8(fresh, "all")
        assert torch.equal(fresh(IMAGES), after)
        before = after


@pytest.mark.long
def test_a_run_rounds_them_once_and_the_optimizer_from_then_on(train, tmp_path, monkeypatch):
    """Three updates, and three more after a resume: the first forward of a process is the only one that rounds."""
    passes, states = [], {}
    quantize, update = fp8.quantize_rows, TrainState.update
    monkeypatch.setattr(fp8, "quantize_rows", lambda x, out: passes.append(x) or quantize(x, out))

    def updated(state, *args, **options):
        layers = [part for part in state.target_encoder.modules() if getattr(part, "fp8", None)]
        before = [layer.quantized.values.clone() for layer in layers]
        update(state, *args, **options)
        for layer, old in zip(layers, before, strict=True):
            assert not torch.equal(layer.quantized.values.view(torch.uint8), old.view(torch.uint8))
            want = quantize(layer.weight)
            assert torch.equal(layer.quantized.values.view(torch.uint8), want.values.view(torch.uint8))
            assert torch.equal(layer.quantized.scale, want.scale)
        states.setdefault(id(state), [state]).append(len(passes))

    monkeypatch.setattr(TrainState, "update", updated)
    run = (f"train.folder={tmp_path}", "optim.epoch_length=3", "model.target_dtype=fp8", "optim.warmup_epochs=0")
    run = (*run, "optim.lr=0.01", "optim.momentum=[0.5, 1.0]")
    for epochs, *resumed in ((1,), (2, "--resume", "--extend")):
        passes.clear()
        outcome = train(*run, f"optim.epochs={epochs}", *resumed)
        assert outcome.code == 0, outcome.err
        assert len(passes) == 3 * 10  # three weights of all blocks but the first and the last
    assert [seen for _, *seen in states.values()] == [[30] * 3] * 2


class CutOffError(Exception):
    pass


@pytest.mark.long
@pytest.mark.parametrize("table", ["tensor"], indirect=True)
def test_a_resumed_run_by_one_scale_has_the_same_bits(train, tmp_path, monkeypatch, table):
    """Cut off after the fifth of six updates, and gone on with from the third."""
    run = ("optim.epoch_length=3", "optim.epochs=2", "train.checkpoint_every=3", "model.target_dtype=fp8")
    run = (*run, "optim.warmup_epochs=0", "optim.lr=0.01", "optim.momentum=[0.5, 1.0]")
    assert train(f"train.folder={tmp_path / 'whole'}", *run).code == 0
    update, updates = TrainState.update, []

    def cut_off(state, *args, **options):
        update(state, *args, **options)
        updates.append(state)
        if len(updates) == 5:
            raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "update", cut_off)
        with pytest.raises(CutOffError):
            train(f"train.folder={tmp_path / 'cut'}", *run)
    assert train(f"train.folder={tmp_path / 'cut'}", *run, "--resume").code == 0
    whole, cut = (
        load_file(next((tmp_path / name / "checkpoints" / "step_00000006").glob("*.safetensors")))
        for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_rounded_in_inference_mode_they_are_written_over_later():
    encoder = quantised()
    with torch.inference_mode():
        before = encoder(IMAGES)
    with torch.no_grad():
        encoder.blocks[0].mlp.fc1.weight.mul_(2)
        assert not torch.equal(encoder(IMAGES), before)


def test_inner_blocks_leave_the_first_and_the_last():
    encoder = quantised("inner")
    encoder.blocks.append(copy.deepcopy(encoder.blocks[0]))
    use_fp8(encoder, "inner")
    low = [[name for name, part in block.named_modules() if getattr(part, "fp8", None)] for block in encoder.blocks]
    assert low == [[], ["attn.qkv", "mlp.fc1", "mlp.fc2"], []]


def test_only_the_other_weights_have_copies():
    """What is read in e4m3 has no 16-bit copy, which the optimizer would write for nobody."""
    encoder = quantised(compute_dtype=torch.bfloat16)
    names = {id(p): name for name, p in encoder.named_parameters()}
    copied, rounded = ({names[id(w)] for w in copies.weights} for copies in encoder.kept_copies())
    layers = {name for name, part in encoder.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    low = ("attn.qkv", "mlp.fc1", "mlp.fc2")
    assert copied == {f"{name}.bias" for name in layers} | {f"{n}.weight" for n in layers if not n.endswith(low)}
    assert rounded == {f"{name}.weight" for name in layers if name.endswith(low)}


def test_a_gpu_without_such_products_is_named(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(UserError, match=r"target_dtype=fp8 needs .* 8\.9 .* A100 has 8\.0"):
        check_fp8(device, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_fp8(device, torch.bfloat16)
    with pytest.raises(UserError, match="compute_dtype=bfloat16"):
        check_fp8(device, torch.float32)
    check_fp8(torch.device("cpu"), torch.float32)
