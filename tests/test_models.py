"""Models: shapes and sizes of the small networks, normalisation, and stacks that equal their members one by one."""

import copy

import pytest
import torch
from torch import nn

from metarobust.models import Normalize, cnn, mlp, residual_network, stack

COPIES, BATCH = 3, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())


def randomised(build, copies=COPIES):
    """Copies of one architecture in float64, every parameter random (normalisation gains start at exactly 1)."""
    generator = seeded()
    models = [build().double() for _ in range(copies)]
    for model in models:
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return models


# Small networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: mlp([64, 16, 10]), 1210),
        (lambda: mlp([64, 10]), 650),
        (lambda: cnn([8, 16]), 3818),
        (lambda: cnn([8, 16], image_size=32, image_channels=3, classes=5), 8 * 28 + 16 * 73 + 5 * (16 * 16 * 16 + 1)),
        (lambda: residual_network([8, 16]), 72 + 16 + (1152 + 32 + 2304 + 32 + 128) + 170),
    ],
)
def test_parameter_counts(build, count):
    assert parameter_count(build()) == count


@pytest.mark.parametrize("size", [7, 8, 28])
def test_cnn_halves_the_image_at_each_later_convolution_rounding_up(size):
    assert cnn([2, 3, 4], image_size=size)(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_a_residual_block_is_its_branch_beside_its_shortcut():
    torch.manual_seed(0)
    network = residual_network([4, 8], image_channels=3).double()
    block, x = network.blocks[0], torch.randn(2, 4, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        block.norm_2.weight.zero_()
        block.norm_2.bias.fill_(-0.25)
    torch.testing.assert_close(block(x), (block.shortcut(x) - 0.25).relu())
    with torch.no_grad():
        block.norm_2.reset_parameters()
        block.shortcut.weight.zero_()
    inner = block.norm_1(block.convolution_1(x)).relu()
    torch.testing.assert_close(block(x), block.norm_2(block.convolution_2(inner)).relu())
    pixels = torch.rand(2, 3, 7, 7, dtype=torch.float64)
    features = block(network.norm(network.convolution(pixels)).relu())
    torch.testing.assert_close(network(pixels), network.linear(features.flatten(2).mean(2)))


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_small_networks_take_images_and_give_logits(batch):
    x = torch.rand(batch, 1, 8, 8)
    assert mlp([64, 16, 10])(x).shape == (batch, 10)
    assert cnn([8, 16])(x).shape == (batch, 10)
    assert residual_network([8, 16])(x).shape == (batch, 10)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: mlp([64]), ValueError, "sizes must be at least an input and an output width, got [64]"),
        (lambda: mlp([64, 0, 10]), ValueError, "sizes must be an integer >= 1, got 0"),
        (lambda: mlp([64, 1.5]), TypeError, "sizes must be an integer >= 1, got 1.5"),
        (lambda: residual_network([]), ValueError, "channels must be at least the width of the first convolution, got []"),
        (lambda: residual_network([8, 6]), ValueError, "channels must be multiples of groups (=4), got [8, 6]"),
        (lambda: residual_network([8], groups=0), ValueError, "groups must be an integer >= 1, got 0"),
        (lambda: cnn([]), ValueError, "channels must be at least one convolution, got []"),
        (lambda: Normalize([0.5, 0.5], [1.0]), ValueError, "std must be as long as mean (=2), got 1"),
        (lambda: Normalize([], []), ValueError, "std must be as long as mean (=0), got 0"),
        (lambda: Normalize([0.5], [0.0]), ValueError, "std must be positive, got [0.0]"),
        (lambda: Normalize("mean", 1.0), TypeError, "mean must be a number, or one per channel, got 'mean'; write mean=[0.5]"),
        (lambda: Normalize(0.5, None), TypeError, "std must be a number, or one per channel, got None; write std=[0.5]"),  # pyright: ignore
        (
            lambda: Normalize([0.5] * 3, [0.5] * 3)(torch.rand(5, 1, 8, 8)),
            ValueError,
            "x must be of 3 channels, as mean and std are, got [5, 1, 8, 8]; give one mean and one std per channel of x",
        ),
        (lambda: Normalize([0.5] * 3, [0.5] * 3)(torch.rand(5, 4, 8, 8)), ValueError, "got [5, 4, 8, 8]"),
        (lambda: Normalize([0.5] * 3, [0.5] * 3)(torch.rand(3)), ValueError, "got [3]"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(build, error, text):
    with pytest.raises(error) as caught:
        build()
    assert text in str(caught.value)


# Normalisation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_subtracts_and_divides_per_channel_and_keeps_the_dtype(dtype):
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    x = torch.rand(2, 3, 4, 5, generator=seeded(), dtype=dtype)
    out = Normalize(mean, std)(x)
    assert out.dtype == dtype
    for channel in range(3):
        torch.testing.assert_close(out[:, channel], (x[:, channel] - mean[channel]) / std[channel])


@pytest.mark.parametrize("value", [0.5, [0.5], torch.tensor(0.5).item()])
def test_one_number_normalizes_all_channels(value):
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(Normalize(value, value)(x), (x - 0.5) / 0.5)


def test_normalize_also_takes_plain_features():
    out = Normalize([1.0, 2.0], [2.0, 4.0])(torch.tensor([[3.0, 10.0]]))
    assert out.tolist() == [[1.0, 2.0]]


def test_normalize_statistics_are_saved_with_the_model_and_not_trained():
    layer = Normalize([0.5], [0.25])
    assert sorted(layer.state_dict()) == ["mean", "std"]
    assert parameter_count(layer) == 0


# Stacks --------------------------------------------------------------------------------------------------------------

IMAGES = (4, 8, 8)
ARCHITECTURES = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear_without_bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear_on_tokens": (lambda: nn.Linear(5, 3), (2, 6, 5)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), IMAGES),
    "convolution_with_stride_and_padding": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGES),
    "convolution_with_uneven_settings": (lambda: nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0)), IMAGES),
    "convolution_in_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), IMAGES),
    "convolution_depthwise_and_dilated": (lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=2), IMAGES),
    "convolution_of_the_same_size": (lambda: nn.Conv2d(4, 6, 3, padding="same"), IMAGES),
    "layer_norm": (lambda: nn.LayerNorm(5), (5,)),
    "layer_norm_on_tokens": (lambda: nn.LayerNorm(5), (6, 5)),
    "layer_norm_on_images": (lambda: nn.LayerNorm([4, 8, 8]), IMAGES),
    "layer_norm_without_bias": (lambda: nn.LayerNorm([8, 8], bias=False), IMAGES),
    "layer_norm_without_parameters": (lambda: nn.LayerNorm(5, elementwise_affine=False), (5,)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "group_norm_on_features": (lambda: nn.GroupNorm(2, 4), (4,)),
    "group_norm_without_parameters": (lambda: nn.GroupNorm(2, 4, affine=False), IMAGES),
    "mlp": (lambda: mlp([5, 7, 3]), (5,)),
    "cnn": (lambda: cnn([8, 16]), (1, 8, 8)),
    "residual": (lambda: residual_network([4, 8, 6], groups=2), (1, 8, 8)),
    "nested": (
        lambda: nn.Sequential(
            Normalize([0.5] * 4, [0.2] * 4),
            nn.Sequential(
                nn.Conv2d(4, 6, 3, padding=1),
                nn.Sequential(nn.GroupNorm(3, 6), nn.Tanh()),
                nn.Conv2d(6, 4, 3, stride=2, groups=2),
            ),
            nn.Flatten(),
            nn.LayerNorm(36),
            nn.Linear(36, 3),
        ),
        IMAGES,
    ),
}  # fmt: skip

every_architecture = pytest.mark.parametrize(("build", "shape"), ARCHITECTURES.values(), ids=ARCHITECTURES)


@every_architecture
def test_a_stack_equals_its_members_one_by_one_with_gradients(build, shape):
    models = randomised(build)
    x = torch.randn(COPIES * BATCH, *shape, generator=seeded(1), dtype=torch.float64)
    together, apart = x.clone().requires_grad_(), x.clone().requires_grad_()
    stacked = stack(models)
    out = stacked(together)
    want = torch.cat([model(rows) for model, rows in zip(models, apart.chunk(COPIES), strict=True)])
    torch.testing.assert_close(out, want)

    weights = torch.randn(out.shape, generator=seeded(2), dtype=torch.float64)
    (weights * out).sum().backward()
    (weights * want).sum().backward()
    torch.testing.assert_close(together.grad, apart.grad)
    members = zip(*(model.parameters() for model in models), strict=True)
    for parameter, own in zip(stacked.parameters(), members, strict=True):
        torch.testing.assert_close(parameter, torch.stack(own))
        torch.testing.assert_close(parameter.grad, torch.stack([p.grad for p in own]))


@every_architecture
def test_a_stack_of_one_is_the_model(build, shape):
    (model,) = randomised(build, copies=1)
    x = torch.randn(BATCH, *shape, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(stack([model])(x), model(x))


def test_parameters_of_a_stack_gain_one_leading_axis_and_are_copies():
    models = randomised(lambda: mlp([5, 7, 3]))
    stacked = stack(models)
    assert [tuple(p.shape) for p in stacked.parameters()] == [(3, 7, 5), (3, 7), (3, 3, 7), (3, 3)]
    before = copy.deepcopy(models[0].state_dict())
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in models[0].state_dict().items())


def test_changing_a_stack_leaves_the_members_alone():
    """Neither moving the stack to another dtype nor hooking it may reach into the models that it was made of."""
    models = [nn.Sequential(Normalize([0.5], [0.2]), nn.Flatten(), nn.Linear(4, 2)) for _ in range(2)]
    calls = []
    stacked = stack(models).double()
    stacked.register_forward_hook(lambda *_: calls.append("hook"))
    models[0](torch.rand(3, 1, 2, 2))
    assert models[0][0].mean.dtype == torch.float32
    assert calls == []


def test_members_with_different_normalisation_are_kept_apart_or_refused():
    models = [nn.Sequential(Normalize([mean], [1.0]), nn.Flatten(), nn.Linear(4, 2)) for mean in (0.0, 0.5)]
    x = torch.rand(6, 1, 2, 2, generator=seeded())
    try:
        stacked = stack(models)
    except ValueError:
        return
    torch.testing.assert_close(stacked(x), torch.cat([m(rows) for m, rows in zip(models, x.chunk(2), strict=True)]))


def test_a_stack_takes_an_empty_batch():
    x = torch.zeros(0, 1, 8, 8)
    assert stack([cnn([2, 3]) for _ in range(2)])(x).shape == (0, 10)
    assert stack([mlp([64, 4, 10]) for _ in range(2)])(x).shape == (0, 10)


def test_a_stack_keeps_the_training_mode_of_every_layer():
    model = nn.Sequential(nn.Sequential(nn.Dropout().eval(), nn.Linear(4, 4)), nn.Dropout())
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in stack([model, model]).named_modules()} == modes
    assert not any(module.training for module in stack([model.eval(), model.eval()]).modules())


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2))),
            ValueError,
            "modules must be free of batch statistics, got BatchNorm2d; use nn.GroupNorm, which keeps rows apart",
        ),
        (
            lambda: nn.BatchNorm1d(4, affine=False),
            ValueError,
            "modules must be free of batch statistics, got BatchNorm1d; use nn.GroupNorm, which keeps rows apart",
        ),
        (
            lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
            ValueError,
            "modules must be free of batch statistics, got BatchNorm1d; use nn.GroupNorm, which keeps rows apart",
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(1, 2, 3)),
            TypeError,
            "modules must be Linear, Conv2d, LayerNorm or GroupNorm wherever a layer has parameters, got Conv1d; "
            "train these one by one instead",
        ),
        (
            lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
            ValueError,
            "padding_mode must be 'zeros' in a stacked convolution, got circular",
        ),
    ],
)
def test_layers_that_cannot_be_stacked_are_refused_in_one_sentence(build, error, text):
    with pytest.raises(error) as caught:
        stack([build(), build()])
    assert text in str(caught.value)


def test_a_stack_of_nothing_is_refused():
    with pytest.raises(ValueError, match="modules must be at least one module, got none"):
        stack([])


@pytest.mark.parametrize(
    "modules",
    [
        lambda: [mlp([4, 3, 2]), mlp([4, 5, 2])],
        lambda: [nn.Linear(4, 2, bias=False), nn.Linear(4, 2)],
        lambda: [nn.Conv2d(1, 2, 3, stride=1), nn.Conv2d(1, 2, 3, stride=2)],
        lambda: [nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.Tanh())],
    ],
    ids=["widths", "bias", "stride", "activation"],
)
def test_members_of_different_structure_are_refused_in_one_sentence(modules):
    with pytest.raises((TypeError, ValueError), match=r"^modules must be"):
        stack(modules())
