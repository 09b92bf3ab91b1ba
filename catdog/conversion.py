"""Giving an older bundle the files of its engines and a score, or a bundle's int8 model another judgement."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catdog import bundle, hardware, metrics, openvino_ir, quantization, storage
from catdog.config import ConvertConfig
from catdog.dataset import DatasetInfo, iter_split, load_info
from catdog.errors import DatasetError, ImageError, UsageError
from catdog.images import decode
from catdog.neither import Gauge
from catdog.quantization import Int8Card
from catdog.records import Record

_BATCH_SIZE: Final = 64

_REVIEW_PRECISION: Final = 0.995
"""For bundles whose card does not tell with which they were made."""


@dataclass(frozen=True, kw_only=True)
class ConversionRecord(Record):
    """What a conversion made."""

    command: str
    output: str
    model_id: str
    previous_model_id: str
    int8: Int8Card | None
    """None without `--data`."""

    duration_s: float

    def summary(self) -> list[str]:
        """What the bundle has now."""
        lines = [f"Converted in {self.duration_s:,.1f} s.", "  float      made"]
        if self.int8 is None:
            lines.append("  int8       not made: it needs --data")
        else:
            lines.append(f"  int8       {'made' if self.int8['is_accepted'] else 'refused'}: {self.int8['rule']}")
            for name, figures in (("float", self.int8["float_validation"]), ("int8", self.int8["validation"])):
                accuracy, log_loss = metrics.text(figures["accuracy"], percent=True), metrics.text(figures["log_loss"])
                lines.append(f"  {name:<10} accuracy {accuracy}, log loss {log_loss}")
        return [*lines, f"Model: {self.output}", f"  model id   {self.model_id}, before {self.previous_model_id}"]


def convert(config: ConvertConfig) -> ConversionRecord:
    """Make the OpenVINO files of a bundle, and put its temperature into its Keras model, which older ones lack.

    What else it holds stays as it is; its card, and so its id, changes.

    Raises:
        UsageError: the dataset has no images in the splits `train` and `val`, or the output holds something else.
        BundleError: the model cannot be used.
        DatasetError: the dataset is missing or damaged.
    """
    started = time.monotonic()
    model = bundle.load(config.model)
    output = storage.absolute(config.output or config.model)
    storage.refuse_foreign_output(output, (bundle.CARD_NAME,))
    hardware.configure_tensorflow(num_threads=hardware.num_cores(), num_parallel=1, use_gpu=False)
    network = bundle.load_model(model)
    ir = openvino_ir.float_ir(network, model.image_size)
    gauge = bundle.load_gauge(model)
    int8, score = None, model.card.get("neither")
    if config.data is not None:
        info = _info(config.data)
        gauge = gauge or quantization.fitted_gauge(ir, model.image_size, _batches(info, "train", model.image_size))
        int8 = _quantized(ir, model, info, gauge)
        score = int8.neither_card(gauge, bundle.golden_scores(network, gauge, model.image_size))
    irs: dict[bundle.Weights, openvino_ir.IR] = {"float": openvino_ir.gauged(ir, gauge)}
    if int8 is not None and int8.card["is_accepted"]:
        irs["int8"] = int8.ir
    made = {*bundle.ir_names("float").values(), *bundle.ir_names("int8").values()}
    kept = {name: path.read_bytes() for name, path in model.paths.items() if name not in made}
    card: dict[str, Any] = model.card | {"int8": None if int8 is None else int8.card, "neither": score}
    if gauge is not None:
        kept[bundle.NEITHER_NAME] = gauge.encoded()
    kept[bundle.MODEL_NAME] = bundle.keras_file(network, model.temperature("float32"))
    model_id = bundle.write(output, card, kept | bundle.ir_files(irs))
    return ConversionRecord(
        command="convert",
        output=output,
        model_id=model_id,
        previous_model_id=model.model_id,
        int8=card["int8"],
        duration_s=round(time.monotonic() - started, 1),
    )


def _info(data: str) -> DatasetInfo:
    info = load_info(data)
    for split in ("train", "val"):
        if not info.num_images(split):
            raise UsageError(f"--data must hold images in the splits train and val. Received: none in {split}")
    return info


def _batches(info: DatasetInfo, split: str, size: int) -> Iterator[quantization.LabelledBatch]:
    for batch in iter_split(info, split, ["uri", "image", "label"], batch_size=_BATCH_SIZE):
        yield _pixels(batch, size), batch["label"].to_numpy()


def _quantized(
    ir: openvino_ir.IR, model: bundle.Bundle, info: DatasetInfo, gauge: Gauge | None
) -> quantization.Quantized:
    photographs: list[npt.NDArray[np.uint8]] = []
    for images_BSSC, _ in _batches(info, "train", model.image_size):
        photographs.extend(images_BSSC)
        if len(photographs) >= quantization.NUM_PHOTOGRAPHS:
            break
    precision = model.card.get("training_config", {}).get("review_precision", _REVIEW_PRECISION)
    photographs = photographs[: quantization.NUM_PHOTOGRAPHS]
    return quantization.quantized(
        ir,
        model.image_size,
        photographs,
        lambda: _batches(info, "val", model.image_size),
        review_precision=precision,
        gauge=gauge,
    )


def _pixels(batch: pa.RecordBatch, size: int) -> npt.NDArray[np.uint8]:
    try:
        return np.stack([decode(image, size).pixels_HWC for image in batch["image"].to_pylist()])
    except ImageError as error:
        raise DatasetError(f"every picture of a dataset must decode. Received: {error}") from error
