import keras
import numpy as np
import pytest

from catdog import architectures
from catdog.errors import UsageError


@pytest.mark.parametrize("name", sorted(architectures.ARCHITECTURES))
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


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--arch must be one of cnn, resnet\. Received: --arch=vgg$"):
        architectures.build_model("vgg", 150)
