"""`catdog.architectures`: every model has the layers, shapes and recipe that it must have."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

from catdog import architectures
from catdog.errors import UsageError

pytestmark = pytest.mark.slow


@pytest.fixture
def mixed_bfloat16() -> Iterator[None]:
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("name", ["cnn", "resnet", "efficientnet_lite0", "efficientnet_lite2", "mobilenetv2"])
def test_a_model_maps_pixels_to_one_probability_with_its_logits_inside(name: str) -> None:
    size = 64
    model = architectures.build_model(name, size)
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, size, size, 3)).astype("float32")
    prob_dog_B1 = np.asarray(model(images_BHWC, training=False))
    logits_B1 = np.asarray(architectures.logits_model(model)(images_BHWC, training=False))
    assert prob_dog_B1.shape == logits_B1.shape == (3, 1)
    assert prob_dog_B1.dtype == logits_B1.dtype == np.float32
    np.testing.assert_allclose(prob_dog_B1, 1 / (1 + np.exp(-logits_B1)), rtol=1e-5)


def test_cnn_is_the_classic_stack() -> None:
    kinds = [type(layer).__name__ for layer in architectures.build_model("cnn", 150).layers]
    assert kinds.count("Conv2D") == kinds.count("MaxPooling2D") == 4
    assert kinds.index("Flatten") < kinds.index("Dense")
    assert keras.activations.serialize(architectures.build_model("cnn", 150).layers[-1].activation) == "sigmoid"


def test_resnet_takes_other_sizes_than_it_was_built_for() -> None:
    model = architectures.build_model("resnet", 128)
    assert model(np.zeros((1, 96, 96, 3), "float32")).shape == (1, 1)


def test_resnet_takes_other_depths_and_widths() -> None:
    usual = architectures.build_model("resnet", 64)
    same = architectures.build_model("resnet", 64, depth=5, width=1.0)
    assert [weight.shape for weight in same.weights] == [weight.shape for weight in usual.weights]

    def kernels(**shape: Any) -> list[tuple[int, ...]]:
        model = architectures.build_model("resnet", 64, **shape)
        return [tuple(weight.shape) for weight in model.weights if len(weight.shape) == 4]

    stem_and_stages = 4
    for depth in (1, 3, 5, 8):
        assert len(kernels(depth=depth)) == stem_and_stages + 2 * depth
    assert max(shape[-1] for shape in kernels(width=0.5)) == 128
    assert {shape[-1] % 8 for shape in kernels(width=0.3)} == {0}


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--arch must be one of cnn, resnet, vgg16, .*\. Received: --arch=vgg$"):
        architectures.build_model("vgg", 150)


def test_a_backbone_gets_pixels_in_float32_and_gives_features_in_it(mixed_bfloat16: None) -> None:
    model = architectures.build_model("efficientnet_lite0", 224)
    backbone = architectures.backbone_layer(model)
    assert backbone is not None
    assert backbone.compute_dtype == "bfloat16"
    assert model.get_layer("scale").compute_dtype == model.get_layer("logits").input.dtype == "float32"
    pixels_BHWC = np.full((1, 40, 40, 3), 200.3, "float32")
    scaled_BHWC = np.asarray(model.get_layer("scale")(pixels_BHWC))
    np.testing.assert_allclose(scaled_BHWC, (pixels_BHWC - 127) / 128, rtol=1e-6)


@pytest.mark.parametrize("fixtures", [[], ["bfloat16", "mixed_bfloat16"]])
def test_a_backbone_infers_also_in_training(fixtures: list[str], request: pytest.FixtureRequest) -> None:
    for fixture in fixtures:
        request.getfixturevalue(fixture)
    model = architectures.build_model("efficientnet_lite0", 224)
    backbone = architectures.backbone_layer(model)
    assert backbone is not None
    scaled_BHWC = np.full((1, 40, 40, 3), 0.573, "float32")
    before = [variable.numpy() for variable in backbone.variables]
    in_training, in_inference = (np.asarray(backbone(scaled_BHWC, training=training)) for training in (True, False))
    np.testing.assert_array_equal(in_training, in_inference)
    for variable, value in zip(backbone.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_backbone_variables_are_all_but_the_head() -> None:
    model = architectures.build_model("efficientnet_lite0", 224)
    variables = architectures.backbone_variables(model)
    head = [variable for variable in model.trainable_variables if not any(variable is other for other in variables)]
    assert [variable.name for variable in variables] == ["kernel", "bias"] * 49
    assert [variable.path for variable in head] == ["logits/kernel", "logits/bias"]
    assert architectures.backbone_variables(architectures.build_model("resnet", 64)) == []


def test_only_published_networks_have_a_backbone() -> None:
    without = [name for name, chosen in architectures.ARCHITECTURES.items() if not chosen.has_backbone]
    assert without == ["cnn", "resnet"]
    for name, chosen in architectures.ARCHITECTURES.items():
        assert (chosen.recipe.head_epochs > 0) == chosen.has_backbone, name
