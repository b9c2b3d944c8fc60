"""The step benchmark's providers, its gate, and how it counts memory, on a model small enough for a test."""
import copy
from types import SimpleNamespace

import pytest
import torch

from bench.baselines.gate import Gate
from bench.baselines.providers import PROVIDERS, Ours, Straight, Tuned
from bench.baselines.step import PARTS, Provider
from bench.harness import heap
from bench.harness.compare import NotRun, observe
from bench.harness.profiling import highest, peak_bytes, top_ops
from bench.harness.workload import MODELS, Model, Setup, draw_masks, rectangular
from bench.test_bench_memory import memory_case
from ijepa_fast.model import SIZES

CPU = torch.device("cpu")
TINY = Model("vit_tiny", 16, 1, gpu_batch=2, cpu_batch=2)


@pytest.fixture(scope="module", autouse=True)
def _shallow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vit_tiny", SIZES["vit_tiny"]._replace(depth=2))
        yield


@pytest.fixture(scope="module")
def shared():
    """A batch and weights that no provider moves, and their gate."""
    setup = Setup(TINY, "truncate", CPU)
    return setup, Gate(setup)


@pytest.mark.parametrize("name", ["ours", "straight", "tuned"])
def test_the_gate_passes_every_provider(shared, name):
    setup, gate = shared
    gate(PROVIDERS[name](setup))


def test_the_gate_takes_ragged_masks_image_by_image():
    setup = Setup(TINY, "ragged", CPU)
    assert len(set(setup.lengths[0].tolist())) > 1, "the masks are not ragged, so this shows nothing"
    Gate(setup)(Ours(setup))
    for name in ("straight", "tuned"):
        with pytest.raises(NotRun, match="rectangular"):
            PROVIDERS[name](setup)


@pytest.mark.parametrize("wrong", ["weights", "pixels", "gradient"])
def test_the_gate_refuses(shared, wrong, monkeypatch):
    setup, gate = shared
    ours = Ours(setup)
    if wrong == "pixels":
        images = setup.images.clone()
        images[0, :64, :64] = 0
        monkeypatch.setattr(setup, "images", images)
    else:
        ours.encoder, ours.predictor = copy.deepcopy((setup.encoder, setup.predictor))
    if wrong == "weights":
        ours.encoder.blocks[1].mlp.fc2.weight.data.mul_(1.01)
    elif wrong == "gradient":
        ours.predictor.predictor_norm.weight.register_hook(lambda gradient: 1.1 * gradient)
    with pytest.raises(AssertionError, match="off by"):
        gate(ours)


def test_one_step_of_every_provider_leaves_the_same_weights(monkeypatch):
    monkeypatch.setattr(Provider, "momentum", 0.996)
    after = {}
    for name in ("ours", "straight", "tuned"):
        setup = Setup(TINY, "truncate", CPU)
        before = torch.cat([p.detach().flatten().clone() for p in setup.target_encoder.parameters()])
        provider = PROVIDERS[name](setup)
        for group in provider.optimizer.param_groups:
            group["lr"] = 1e-2
        provider.step()
        modules = (setup.encoder, setup.target_encoder)  # shared: whatever a provider does, it does to these
        after[name] = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in modules]
        moved = after[name][1] - before
        assert moved.abs().max() > 1e-5, "the target did not move"
    for name in ("straight", "tuned"):
        for mine, theirs in zip(after["ours"], after[name], strict=True):
            # Adam's first step is lr * sign(gradient): where a gradient is all rounding, its sign may differ.
            different = (mine - theirs).abs() > 1e-6
            assert different.float().mean() < 1e-3, f"{name}: {different.float().mean():.1%} of the weights differ"


def test_every_provider_steps_and_the_next_one_passes_the_same_gate(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", TINY)
    bench = SimpleNamespace(device=CPU, released=None, compiled=False)
    rows = {name: outcome.fields for name, outcome in observe(memory_case("tiny", "truncate", bench), None).items()}
    assert {name for name, fields in rows.items() if fields["status"] == "observed"} == {"ours", "tuned", "straight"}
    assert all(rows[name]["peak_bytes"] > rows[name]["persistent_bytes"] > 0 for name in ("ours", "tuned", "straight"))


def test_a_provider_is_timed_under_its_own_setting_of_the_allocator(shared, monkeypatch):
    monkeypatch.setattr(heap, "_now", None)
    setup, _ = shared
    ours, straight = Ours(setup), Straight(setup)
    for provider, setting in ((ours, "kept"), (straight, "returned"), (straight, "returned"), (ours, "kept")):
        provider.before_step()
        assert heap._now == setting
        assert not provider.marks.steps, "the untimed step would count"


def test_marks_cut_the_step_into_its_parts(shared):
    straight = Straight(shared[0])
    for _ in range(2):
        straight.step()
    assert [part for part, _ in straight.marks.steps[-1]] == ["start", *PARTS]
    straight.marks.steps[:] = [[("start", 0.0), ("target", 1.0), ("context", 3.0)], [("start", 5.0), ("target", 8.0)]]
    assert straight.marks.seconds(last=1) == {"target": 3.0}
    assert straight.marks.seconds(last=2) == {"target": 3.0, "context": 2.0}


def test_weights_are_shared_and_state_is_counted_once():
    setup = Setup(TINY, "truncate", CPU)
    ours, tuned = Ours(setup), Tuned(setup)
    assert ours.encoder.norm.weight.data_ptr() == tuned.encoder.norm.weight.data_ptr()
    ours.step()
    trained = sum(p.numel() for p in ours.trained())
    frozen = [setup.target_encoder, setup.encoder.pos_embed, setup.predictor.predictor_pos_embed]
    frozen = sum(p.numel() for f in frozen for p in (f.parameters() if hasattr(f, "parameters") else [f]))
    steps = len(list(ours.trained()))  # AdamW's counters
    batch = sum(x.untyped_storage().nbytes() for x in ours.inputs())
    assert ours.persistent_bytes() == 4 * (3 * trained + frozen + steps) + batch


def test_the_released_code_runs_from_a_checkout_only(shared, monkeypatch, tmp_path):
    setup, _ = shared
    with pytest.raises(NotRun, match="needs --released"):
        PROVIDERS["released"](setup)
    monkeypatch.setattr(setup, "released", tmp_path)
    with pytest.raises(NotRun, match="no checkout"):
        PROVIDERS["released"](setup)


def test_peak_of_a_call_is_the_most_it_holds_at_once():
    megabyte = 1 << 20

    def call():
        a = torch.empty(3 * megabyte, dtype=torch.uint8)
        b = torch.empty(5 * megabyte, dtype=torch.uint8)
        del a
        c = torch.empty(4 * megabyte, dtype=torch.uint8)
        return b, c

    peak = peak_bytes(call, CPU)
    assert 9 * megabyte <= peak < 9.1 * megabyte
    assert highest([3, 5, -3, 4, -9, 1]) == 9


def test_a_profile_names_what_takes_the_time():
    a = torch.ones(256, 256)
    (top, *_) = top_ops(lambda: [a @ a for _ in range(20)], CPU)
    assert top["name"] == "aten::mm"
    assert top["calls"] == 20
    assert 50 < top["percent"] <= 100


def test_median_masks_are_rectangular_only_where_truncated():
    truncated = draw_masks(14, 16, "truncate")
    contexts = rectangular(truncated.context, 16)
    assert [tuple(m.shape) for m in contexts] == [(16, int(truncated.context.cu_seqlens[1]))]
    assert len(rectangular(truncated.target, 16)) == 4
    image = 5
    begin = int(truncated.context.cu_seqlens[image])
    assert contexts[0][image].equal(truncated.context.indices[begin : begin + contexts[0].shape[1]].long())
    with pytest.raises(ValueError, match="not rectangular"):
        rectangular(draw_masks(14, 16, "ragged").context, 16)


def test_every_recipe_has_its_sizes():
    for name, model in MODELS.items():
        assert model.predictor_size.dim % model.size.num_heads == 0, name
        assert 224 % model.patch_size == 0


def test_a_ragged_batch_has_more_tokens(shared):
    assert shared[0].tokens() < Setup(TINY, "ragged", CPU).tokens()
