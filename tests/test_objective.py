"""The packed step against the straight one: same loss, same gradients, however the batch is laid out or split."""
import pytest
import torch
from ijepa_kernels import IMAGENET_MEAN, IMAGENET_STD, Packed
from torch import Tensor, nn

from bench.baselines.straight import straight_loss, straight_models
from ijepa_fast.blocks import Block
from ijepa_fast.config import MaskConfig
from ijepa_fast.masks import Masks, MultiBlockMasks
from ijepa_fast.model import Predictor, Size, VisionTransformer, init_weights
from ijepa_fast.objective import ijepa_loss
from ijepa_fast.parallel import checkpoint_blocks

GRID = 6
BATCH = 4
# Relative to the largest entry of each gradient: an entry is a sum of up to thousands of products of that size, so its
# rounding error is set by the largest and not by itself. (The keys' bias has a zero gradient, softmax being invariant;
# both sides hold rounding noise there.) fp32 rounds at 6e-8 and a gradient here passes some 30 sums in a row; 1e-6 is
# the most that was seen, and another BLAS sums in another order.
TOLERANCE = 5e-6

Models = tuple[VisionTransformer, Predictor, VisionTransformer]


def build_models(patch_size: int, seed: int = 0) -> Models:
    """Encoder, predictor and target encoder of 2 blocks, every parameter random: no bias or norm left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    size = Size(dim=96, depth=2, num_heads=3, mlp_dim=384)
    encoder, target_encoder = (
        VisionTransformer(size, GRID * patch_size, patch_size, torch.float32, torch.float32) for _ in range(2)
    )
    predictor = Predictor(size.dim, Size(48, 2, 3, 192), GRID, torch.float32, torch.float32)
    for model in (encoder, predictor, target_encoder):
        init_weights(model, generator)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise, alpha=0.05 if parameter.ndim > 1 else 0.2)
    target_encoder.requires_grad_(False)
    target_encoder.norm.weight.mul_(0.03)  # small features, so that the eps of their normalisation counts
    target_encoder.norm.bias.mul_(0.03)
    return encoder, predictor, target_encoder


def random_images(patch_size: int, batch: int = BATCH) -> Tensor:
    side = GRID * patch_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def random_masks(number: int, length: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(number, BATCH, GRID**2, generator=generator)
    return list(scores.argsort(dim=-1)[..., :length].sort(dim=-1).values)


def mask_major(contexts: list[Tensor], targets: list[Tensor]) -> Masks:
    """The released order: target by target, each once for every context, image by image."""
    repeated = [target for target in targets for _ in contexts]
    sequences = torch.arange(len(contexts) * BATCH, dtype=torch.int32)  # of the contexts: context by context, by image
    return Masks(
        Packed.from_masks(contexts, GRID**2), Packed.from_masks(repeated, GRID**2), sequences.repeat(len(targets))
    )


def rectangles(masks: Masks, num_contexts: int) -> tuple[list[Tensor], list[Tensor]]:
    """The masks of our collator, truncated to equal lengths, as lists of [B, K]."""
    contexts = masks.context.indices.long().view(BATCH, num_contexts, -1).unbind(1)
    lengths = masks.target.cu_seqlens.diff()
    targets = masks.target.indices.long().view(BATCH, num_contexts, -1, int(lengths[0]))
    assert (targets == targets[:, :1]).all()  # listed once for each context
    return list(contexts), list(targets[:, 0].unbind(1))


def gradients(*models: nn.Module) -> dict[str, Tensor]:
    """By name, encoder's and predictor's together, those of frozen parameters left out; and cleared."""
    found = {}
    for index, model in enumerate(models):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{index}.{name}"] = parameter.grad
                parameter.grad = None
    return found


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert error < TOLERANCE, f"{name}: off by {error:.1e} of its largest entry"


def straight_reference(models: Models, images: Tensor, contexts: list[Tensor], targets: list[Tensor], kind: str):
    """Loss and gradients of the straight step in float64, so that the whole difference is ours."""
    encoder, predictor, target_encoder = models
    twin_encoder, twin_predictor = straight_models(encoder, predictor)
    twin_target, _ = straight_models(target_encoder, predictor)
    twins = [twin.double() for twin in (twin_encoder, twin_predictor, twin_target)]
    loss = straight_loss(*twins, images.double(), contexts, targets, kind)
    loss.backward()
    return loss.detach(), gradients(*twins[:2])


@pytest.mark.parametrize("kind", ["smooth_l1", "l2"])
@pytest.mark.parametrize("source", ["mask-major", "collator"])
@pytest.mark.parametrize("num_contexts", [1, 2])
@pytest.mark.parametrize("patch_size", [14, 16])
def test_loss_and_every_gradient_equal_the_straight_step(patch_size, num_contexts, source, kind):
    models = build_models(patch_size)
    if source == "mask-major":
        contexts, targets = random_masks(num_contexts, 17, seed=2), random_masks(4, 6, seed=3)
        masks = mask_major(contexts, targets)
    else:
        config = MaskConfig(collate="truncate", group=BATCH, num_contexts=num_contexts, min_keep=3)
        masks = MultiBlockMasks(config, GRID, seed=0, global_batch=BATCH).sample(0, 0, BATCH)
        contexts, targets = rectangles(masks, num_contexts)
    images = random_images(patch_size)
    expected_loss, expected = straight_reference(models, images, contexts, targets, kind)

    encoder, predictor, target_encoder = models
    loss = ijepa_loss(encoder, predictor, target_encoder, images, masks, kind=kind)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=TOLERANCE, atol=0)
    ours = gradients(encoder, predictor)
    trained = sum(p.requires_grad for model in (encoder, predictor) for p in model.parameters())
    assert len(ours) == trained  # every one, mask_token among them
    assert_close(ours, expected)
    assert all(p.grad is None for p in target_encoder.parameters())


def test_one_context_an_image_needs_no_context_of():
    models = build_models(16)
    contexts, targets = random_masks(1, 17, seed=2), random_masks(4, 6, seed=3)
    with_numbers = mask_major(contexts, targets)
    images = random_images(16)
    losses = [ijepa_loss(*models, images, with_numbers._replace(context_of=c)) for c in (with_numbers.context_of, None)]
    assert torch.equal(*losses)


def test_ragged_equals_one_image_and_one_target_at_a_time():
    models = build_models(16)
    encoder, predictor, _ = models
    config = MaskConfig(sampler="corrected", collate="ragged", group=1, min_keep=2)
    masks = MultiBlockMasks(config, GRID, seed=5, global_batch=BATCH).sample(0, 0, BATCH)
    images = random_images(16)
    contexts = masks.context.indices.long().tensor_split(masks.context.cu_seqlens[1:-1].tolist())
    targets = masks.target.indices.long().tensor_split(masks.target.cu_seqlens[1:-1].tolist())
    assert len({len(context) for context in contexts}) > 1
    assert len({len(target) for target in targets}) > 1

    loss = ijepa_loss(*models, images, masks)
    loss.backward()
    ours = gradients(encoder, predictor)

    expected_loss, expected = 0.0, {}
    for target, context_of in zip(targets, masks.context_of.tolist(), strict=True):
        image = int(masks.context.image[context_of])
        part, part_gradients = straight_reference(
            models, images[image : image + 1], [contexts[context_of][None]], [target[None]], "smooth_l1"
        )
        weight = len(target) / len(masks.target.indices)
        expected_loss += weight * part
        for name, gradient in part_gradients.items():
            expected[name] = expected.get(name, 0) + weight * gradient
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=TOLERANCE, atol=0)
    assert_close(ours, expected)


@pytest.mark.parametrize("patch_size", [14, 16])
def test_bytes_equal_the_same_images_normalised(patch_size):
    models = build_models(patch_size)
    side = GRID * patch_size
    pixels = torch.randint(0, 256, (BATCH, side, side, 3), generator=torch.Generator().manual_seed(4))
    normalised = (pixels.double() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    masks = mask_major(random_masks(1, 17, seed=2), random_masks(4, 6, seed=3))
    results = []
    for images in (pixels.to(torch.uint8), normalised.permute(0, 3, 1, 2).float()):
        loss = ijepa_loss(*models, images, masks)
        loss.backward()
        results.append((loss.detach(), gradients(*models[:2])))
    (from_bytes, ours), (from_floats, expected) = results
    torch.testing.assert_close(from_bytes, from_floats, rtol=TOLERANCE, atol=0)
    assert_close(ours, expected)


@pytest.mark.parametrize("collate", ["truncate", "ragged"])
def test_micro_batches_with_the_whole_denominator_sum_to_the_batch(collate):
    models = build_models(16)
    encoder, predictor, _ = models
    config = MaskConfig(sampler="corrected", collate=collate, group=BATCH, min_keep=2)
    sampler = MultiBlockMasks(config, GRID, seed=7, global_batch=BATCH)
    images = random_images(16)
    whole = ijepa_loss(*models, images, sampler.sample(3, 0, BATCH))
    whole.backward()
    expected = gradients(encoder, predictor)

    denominator = sampler.count_targets(3) * encoder.size.dim
    losses = []
    for start, stop in ((0, 1), (1, BATCH)):
        part = ijepa_loss(*models, images[start:stop], sampler.sample(3, start, stop), denominator=denominator)
        part.backward()
        losses.append(part.detach())
    torch.testing.assert_close(sum(losses), whole.detach(), rtol=TOLERANCE, atol=0)
    assert_close(gradients(encoder, predictor), expected)


@pytest.mark.parametrize(
    "rules",
    [
        {"sampler": "corrected", "collate": "ragged", "views": 2, "num_contexts": 2},
        {"sampler": "reference", "collate": "truncate"},
    ],
    ids=["ragged", "truncated"],
)
def test_what_no_target_block_covers_need_not_be_finished(rules):
    models = build_models(16)
    masks = MultiBlockMasks(MaskConfig(group=2, min_keep=2, **rules), GRID, 9, BATCH).sample(1, 0, BATCH)
    finished = []
    models[2].blocks[-1].mlp.register_forward_hook(lambda _module, _args, out: finished.append(len(out.value)))
    results = []
    for covered in (masks.covered, None):
        loss = ijepa_loss(*models, random_images(16), masks._replace(covered=covered))
        loss.backward()
        results.append((loss.detach(), gradients(*models[:2])))
    assert finished == [len(masks.covered.rows), BATCH * GRID**2]
    assert finished[0] < 0.9 * finished[1]
    # The same sums, in products over fewer rows, which are blocked otherwise: the target's features differ by their
    # last bits, the loss, a mean over hundreds, by less than one rounding of each term.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("rules", "depth"),
    [
        ({"sampler": "corrected", "collate": "ragged", "views": 2, "num_contexts": 2}, 2),
        ({"sampler": "reference", "collate": "truncate"}, 1),
    ],
    ids=["ragged", "truncated, one block"],
)
def test_what_enters_the_predictor_is_projected_once(rules, depth, policy, monkeypatch):
    encoder, _, target_encoder = build_models(16)
    predictor = Predictor(encoder.size.dim, Size(48, depth, 3, 192), GRID, torch.float32, torch.float32)
    init_weights(predictor, torch.Generator().manual_seed(1))
    checkpoint_blocks(predictor, policy)
    masks = MultiBlockMasks(MaskConfig(group=2, min_keep=2, **rules), GRID, 9, BATCH).sample(1, 0, BATCH)
    projected = []
    predictor.predictor_blocks[0].attn.qkv.register_forward_pre_hook(lambda _module, args: projected.append(len(*args)))
    forward, results, once = Block.forward, [], len(masks.context.indices) + GRID**2
    for plain in (False, True):
        if plain:  # as any other block, from the stream of all sequences
            monkeypatch.setattr(Block, "forward", lambda self, *args: forward(self, *args[:5]))
        loss = ijepa_loss(encoder, predictor, target_encoder, random_images(16), masks)
        loss.backward()
        results.append((loss.detach(), gradients(encoder, predictor)))
        assert set(projected) == {once if not plain else len(masks.target.indices) + 4 * len(masks.context.indices)}
        projected.clear()
    # The same rows of the same product, blocked otherwise; a gradient sums a row's uses before the product, not after.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    assert_close(*(found for _, found in results))


def test_two_runs_are_equal_bit_for_bit():
    masks = mask_major(random_masks(2, 17, seed=2), random_masks(4, 6, seed=3))
    runs = []
    for _ in range(2):
        models = build_models(16)
        loss = ijepa_loss(*models, random_images(16), masks)
        loss.backward()
        runs.append({"loss": loss.detach(), **gradients(*models[:2])})
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
