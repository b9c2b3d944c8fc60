"""The linear probe: LARS against its formula, many heads in one pass against one at a time, and scikit-learn."""
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from test_evaluation_features import HALF_A_POINT, clouds

from ijepa_fast.errors import UserError
from ijepa_fast.evaluation import linear
from ijepa_fast.evaluation.linear import Setting, choose_heads, lars_, train_heads


def formula(weight, gradient, velocity, lr, decay, momentum, trust):
    """Algorithm 1 of arXiv 1708.03888 for one layer, in float64, as it is written there."""
    local = trust * np.linalg.norm(weight) / (np.linalg.norm(gradient) + decay * np.linalg.norm(weight))
    velocity = momentum * velocity + lr * local * (gradient + decay * weight)
    return weight - velocity, velocity


def test_lars_is_its_formula():
    rng = np.random.default_rng(0)
    heads, lr, decay = 3, np.array([0.5, 2.0, 40.0]), np.array([0.0, 5e-4, 0.1])
    weight, bias = rng.normal(size=(heads, 4, 7)), rng.normal(size=(heads, 4))
    velocity, bias_velocity = np.zeros_like(weight), np.zeros_like(bias)
    ours = [torch.from_numpy(x.copy()) for x in (weight, bias, velocity, bias_velocity)]
    for _ in range(5):
        gradient, bias_gradient = rng.normal(size=weight.shape), rng.normal(size=bias.shape)
        lars_(
            ours[:2], [torch.from_numpy(gradient), torch.from_numpy(bias_gradient)], ours[2:],
            torch.from_numpy(lr), torch.from_numpy(decay), momentum=0.8, trust=0.01,
        )  # fmt: skip
        for head in range(heads):
            weight[head], velocity[head] = formula(
                weight[head], gradient[head], velocity[head], lr[head], decay[head], 0.8, 0.01
            )
        bias_velocity = 0.8 * bias_velocity + lr[:, None] * bias_gradient  # neither scaled nor decayed
        bias -= bias_velocity
    # The same formula in the same precision: a few roundings of float64 apart.
    np.testing.assert_allclose(ours[0].numpy(), weight, rtol=1e-12)
    np.testing.assert_allclose(ours[1].numpy(), bias, rtol=1e-12)


def test_lars_without_adaptation_is_sgd():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1, 3, 5, generator=generator), torch.randn(1, 3, generator=generator)
    plain = [x.clone().requires_grad_() for x in (weight, bias)]
    sgd = torch.optim.SGD([{"params": plain[:1], "weight_decay": 0.01}, {"params": plain[1:]}], lr=0.3, momentum=0.9)
    velocities = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(4):
        gradients = [torch.randn(x.shape, generator=generator) for x in (weight, bias)]
        lars_([weight, bias], gradients, velocities, torch.tensor([0.3]), torch.tensor([0.01]), adapt=False)
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient
        sgd.step()
    torch.testing.assert_close(weight, plain[0])
    torch.testing.assert_close(bias, plain[1])


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_heads_trained_together_are_heads_trained_alone(optimizer):
    x, y = clouds(120, 0)
    settings = [Setting(0.01, 0.0, True), Setting(1.0, 5e-4, False), Setting(0.1, 5e-4, True)]
    together = train_heads([x], y, settings, classes=5, optimizer=optimizer, epochs=4)
    for number, setting in enumerate(settings):
        alone = train_heads([x], y, [setting], classes=5, optimizer=optimizer, epochs=4)
        torch.testing.assert_close(together.weight[number], alone.weight[0])
        torch.testing.assert_close(together.bias[number], alone.bias[0])
        torch.testing.assert_close(together.logits(x)[:, number], alone.logits(x)[:, 0])


def test_a_head_learns_by_the_gradients_of_cross_entropy():
    x, y = clouds(40, 0)
    heads = train_heads([x], y, [Setting(0.1, 0.0, True)], classes=5, optimizer="sgd", epochs=1, batch=40)
    start = train_heads([x], y, [Setting(0.0, 0.0, True)], classes=5, optimizer="sgd", epochs=1, batch=40)
    weight, bias = start.weight[0].clone().requires_grad_(), start.bias[0].clone().requires_grad_()
    normal = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    torch.nn.functional.cross_entropy(normal @ weight.T + bias, y).backward()
    torch.testing.assert_close(heads.weight[0], start.weight[0] - 0.1 * weight.grad)
    torch.testing.assert_close(heads.bias[0], start.bias[0] - 0.1 * bias.grad)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_linear_is_scikit_learns(optimizer):
    """Both look for the least cross-entropy of a linear classifier, as far as held-out training images go along."""
    (x, y), (x_val, y_val) = clouds(640, 0), clouds(4000, 1)
    x, x_val = ((part / torch.logspace(-2, 2, 24)) for part in (x, x_val))  # not a test of conditioning
    heads = choose_heads([x], y, classes=5, optimizer=optimizer, decays=(0.0,), epochs=20)
    mean, std = x.mean(0), x.std(0)
    reference = GridSearchCV(LogisticRegression(max_iter=1000), {"C": (1e-2, 0.1, 1.0)}, cv=3)
    reference.fit(((x - mean) / std).numpy(), y.numpy())
    ours = float(heads.accuracy(x_val, y_val)[0])
    assert abs(ours - reference.score(((x_val - mean) / std).numpy(), y_val.numpy())) <= HALF_A_POINT
    assert 0.5 < ours < 0.95


def test_the_grid_is_judged_on_a_part_of_train_alone(monkeypatch):
    """Heads are trained twice: all of the grid on four fifths, then the best on everything."""
    calls, train = [], train_heads
    monkeypatch.setattr(linear, "train_heads", lambda views, labels, settings, **how: calls.append(
        (len(labels), len(settings))) or train(views, labels, settings, **how))  # fmt: skip
    x, y = clouds(100, 0)
    chosen = choose_heads([x], y, classes=5, rates=(1e-9, 0.1), decays=(0.0,), optimizer="sgd", epochs=10)
    assert calls == [(80, 4), (100, 1)]
    assert chosen.settings[0].lr == 0.1


def test_a_head_that_diverged_is_not_chosen():
    x, y = clouds(100, 0)
    how = {"classes": 5, "optimizer": "sgd", "epochs": 30, "decays": (100.0,)}
    assert choose_heads([x], y, rates=(1e30, 1e-3), **how).settings[0].lr == 1e-3
    with pytest.raises(UserError, match="every head of the linear probe diverged"):
        choose_heads([x], y, rates=(1e30, 1e31), **how)
