"""What `catdog bench predict` compares with ours: roles, which return nothing.

All label the same folder of files with the model of the same bundle on the CPU, and write Parquet files with a row per
image: `name`, the name of the file, and `prob_dog`. Their settings are `pictures`, the folder; `output`, a folder that
is there; `model`, the path of `model.keras`; `openvino`, the path of the XML file, or nothing; `image_size`;
`batch_size`.

- `keras`: Keras's `image_dataset_from_directory` and `model.predict`.
- `daft`: Daft decodes and resizes, and hands batches to a class that has loaded the Keras model once, and computes it
  in bfloat16 where the CPU can.
- `daft_openvino`: the same with OpenVINO, and the model that the bundle has for it.
- `ray_docs`: Ray Data's documentation of batch inference, https://docs.ray.io/en/latest/data/batch_inference.html, with
  a Keras model.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from catdog import hardware, openvino_ir
from catdog.bench import processes
from catdog.bench.processes import Settings

Batch = dict[str, npt.NDArray[Any]]


def keras(settings: Settings) -> None:
    """Label as Keras's guides do."""
    from keras import saving, utils

    size = settings["image_size"]
    dataset = utils.image_dataset_from_directory(
        settings["pictures"],
        labels=None,
        image_size=(size, size),
        batch_size=settings["batch_size"],
        interpolation="bilinear",
        shuffle=False,
    )
    names = [Path(path).name for path in dataset.file_paths]
    model = saving.load_model(settings["model"], compile=False)
    probs = model.predict(dataset, verbose=0)[:, 0]
    pq.write_table(pa.table({"name": names, "prob_dog": probs}), Path(settings["output"], "part-0.parquet"))


class KerasPredictor:
    """A Keras model that is loaded once per process."""

    def __init__(self, settings: Settings) -> None:
        from keras import saving

        self._model = saving.load_model(settings["model"], compile=False)

    def __call__(self, batch: Batch) -> Batch:
        """The batch of Ray Data, with probabilities in the place of the pixels."""
        probs = self._model.predict(batch["image"], verbose=0)[:, 0]
        return {"name": np.array([Path(path).name for path in batch["path"]]), "prob_dog": probs}


def ray_docs(settings: Settings) -> None:
    """Label as Ray Data's documentation does, with as many actors as there are cores for."""
    import ray

    # The documentation lets Ray start by itself. Where another Ray runs on this machine, that would join it.
    ray.init(address="local")
    size = settings["image_size"]
    images = ray.data.read_images(settings["pictures"], size=(size, size), mode="RGB", include_paths=True)
    predictions = images.map_batches(
        KerasPredictor,
        fn_constructor_args=(settings,),
        batch_size=settings["batch_size"],
        # A pool of a fixed size that took all cores would leave none to read with, and wait for ever.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=hardware.num_cores()),
    )
    predictions.write_parquet(settings["output"])


def keras_probabilities(settings: Settings) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """The bundle's model, compiled, in bfloat16 where the CPU can: images (B, S, S, 3) → probabilities (B,)."""
    import tensorflow as tf
    from keras import saving

    from catdog.architectures import in_bfloat16

    model = saving.load_model(settings["model"], compile=False)
    if hardware.has_bfloat16():
        model = in_bfloat16(model)

    def compute(images_BHWC: Any) -> Any:
        return model(tf.cast(images_BHWC, tf.float32), training=False)[:, 0]

    compute = tf.function(compute, autograph=False, reduce_retracing=True)

    def probabilities(images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = compute(tf.constant(images_BHWC)).numpy()
        return found

    return probabilities


def openvino_probabilities(settings: Settings) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """OpenVINO's model of the bundle on all cores: images (B, S, S, 3) → probabilities (B,)."""
    core = openvino_ir.load_openvino().Core()
    compiled = core.compile_model(settings["openvino"], "CPU", {"PERFORMANCE_HINT": "LATENCY"})

    def probabilities(images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        logits = np.asarray(compiled([images_BHWC])[0], np.float32).reshape(-1)
        found: npt.NDArray[np.float32] = (1 / (1 + np.exp(-logits))).astype(np.float32)
        return found

    return probabilities


def _daft(
    settings: Settings, load: Callable[[Settings], Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]]
) -> None:
    for name in ("DO_NOT_TRACK", "SCARF_NO_ANALYTICS"):  # else it calls home
        os.environ[name] = "true"
    daft = importlib.import_module("daft")  # it is no requirement of catdog, and may be missing
    size = settings["image_size"]

    class Predictor:
        def __init__(self) -> None:
            self._probabilities = load(settings)

        def __call__(self, images: Any) -> Any:
            pixels_BX = images.to_arrow().storage.flatten().to_numpy(zero_copy_only=False)
            return self._probabilities(pixels_BX.reshape(-1, size, size, 3))

    # One instance computes a batch on all cores, while Daft's own threads decode the next ones.
    predicted = daft.udf(
        return_dtype=daft.DataType.float32(), batch_size=settings["batch_size"], concurrency=1, use_process=False
    )(Predictor)
    col = daft.col
    fixed = daft.DataType.image(daft.ImageMode.RGB, size, size)  # which Arrow holds as one run of bytes
    predictions = (
        daft.from_glob_path(settings["pictures"] + "/*")
        .with_column("image", col("path").url.download().image.decode(mode=daft.ImageMode.RGB))
        .with_column("image", col("image").image.resize(size, size).cast(fixed))
        .select(col("path").str.split("/").list.get(-1).alias("name"), predicted(col("image")).alias("prob_dog"))
    )
    predictions.write_parquet(settings["output"])


def daft(settings: Settings) -> None:
    """Label with Daft and Keras."""
    _daft(settings, keras_probabilities)


def daft_openvino(settings: Settings) -> None:
    """Label with Daft and OpenVINO."""
    _daft(settings, openvino_probabilities)


NEEDS: Final[Mapping[str, Sequence[str]]] = {"daft": ("daft",), "daft_openvino": ("daft", "openvino")}
"""The packages of each peer that catdog does not bring along."""


def missing(name: str) -> list[str]:
    """The packages that a peer needs, and that are not installed."""
    return [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]


def versions() -> dict[str, str]:
    """Package → version of what only peers need, where it is installed."""
    found = {}
    for package in sorted({package for needed in NEEDS.values() for package in needed}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


if __name__ == "__main__":
    processes.main(keras, daft, daft_openvino, ray_docs)
