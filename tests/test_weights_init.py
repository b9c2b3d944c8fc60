"""`train.init_from`: which weights a run begins with, and that nothing else is taken."""
import copy
from pathlib import Path

import pytest
import torch
from released_file import SMALL, Training, new_training, write_released

import ijepa_fast.weights.huggingface as huggingface
from ijepa_fast.errors import UserError
from ijepa_fast.model import Predictor, Size, VisionTransformer, init_weights
from ijepa_fast.optim import build_optimizer
from ijepa_fast.run import TrainState
from ijepa_fast.weights.init_from import init_from
from ijepa_fast.weights.load import read
from ijepa_fast.weights.ours import ALONE, write


@pytest.fixture(scope="module")
def training() -> Training:
    return new_training()


@pytest.fixture(scope="module")
def released(training, tmp_path_factory) -> Path:
    return write_released(tmp_path_factory.mktemp("released") / "weights.pth.tar", training)


def new_state(depth: int = 2, predictor_dim: int = 48) -> TrainState:
    size = SMALL._replace(depth=depth)
    encoder = VisionTransformer(size, 24, 4, torch.float32, torch.float32)
    predictor = Predictor(192, Size(predictor_dim, 1, 3, 192), 6, torch.float32, torch.float32)
    generator = torch.Generator().manual_seed(5)
    init_weights(encoder, generator)
    init_weights(predictor, generator)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    return TrainState(encoder, predictor, target_encoder, build_optimizer(encoder, predictor))


def is_of(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    held = other.state_dict()
    return all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


def test_all_models_of_a_released_checkpoint_and_no_optimizer(released, training):
    state = new_state()
    said = init_from(released, state, ALONE)
    assert said == (
        f"weights from {released}, the released checkpoint weights.pth.tar: both encoders and the predictor"
    )
    assert is_of(state.encoder, training.encoder)
    assert is_of(state.target_encoder, training.target_encoder)
    assert is_of(state.predictor, training.predictor)
    assert not state.optimizer.state
    assert all(p.requires_grad == ("pos_embed" not in name) for name, p in state.encoder.named_parameters())


@pytest.mark.parametrize("which", ["target", "context"])
@pytest.mark.parametrize("kind", ["hf", "safetensors"])
def test_both_encoders_begin_with_the_only_one(released, training, tmp_path, kind, which):
    contents = read(released)
    path = tmp_path / ("hf" if kind == "hf" else "weights.safetensors")
    (huggingface.write if kind == "hf" else write)(path, contents, which)
    state = new_state()
    said = init_from(path, state, ALONE)
    assert f"both encoders begin with its {which} encoder and a new predictor" in said
    only = training.target_encoder if which == "target" else training.encoder
    assert is_of(state.encoder, only)
    assert is_of(state.target_encoder, only)
    assert is_of(state.predictor, new_state().predictor)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"depth": 3}, "its encoder.blocks.2.attn.proj.bias is missing, the config's has [192]"),
        ({"depth": 1}, "its encoder.blocks.1.attn.proj.bias has shape [192], the config's model has none"),
        ({"predictor_dim": 96}, "its predictor.mask_token has shape [1, 1, 48], the config's has [1, 1, 96]"),
    ],
)
def test_weights_of_another_model_change_nothing(released, state, said):
    fresh = new_state(**state)
    with pytest.raises(UserError) as error:
        init_from(released, fresh, ALONE)
    begin = f"train.init_from: {released} holds another model than the config describes: "
    assert str(error.value) == begin + said
    assert is_of(fresh.encoder, new_state(**state).encoder)
