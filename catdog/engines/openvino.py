"""The OpenVINO engine: it computes the IR of a bundle on CPU cores, in int8 or, where the CPU has it, in bfloat16.

A call computes on the calling thread's own request, on one core: OpenVINO has a stream of one thread per request.
Threads are not pinned to cores, for two processes would pin theirs to the same ones.

Images are computed up to `BATCH_SIZE` at a time. If on this CPU an output depends on the number of images in a call, or
on the place of an image among them, they are computed one by one.
"""

import queue
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from catdog import hardware, openvino_ir
from catdog.bundle import Arithmetic, Bundle, golden_images, ir_names
from catdog.engines import Outputs
from catdog.errors import BundleError, UsageError
from catdog.openvino_ir import IR

_NOTHING: Final = np.empty(0, np.float32)

BATCH_SIZE: Final = 4
"""Largest number of images in a request. With 16, EfficientNet-Lite2 was 5 % faster in int8, and no faster else."""


def load(bundle: Bundle, *, num_parallel: int, use_gpu: bool) -> "OpenVINOEngine":
    """Load a bundle's model: see `catdog.engines.load_engine`. The int8 model, if the card accepts it."""
    return _load(bundle, num_parallel, use_gpu, is_int8=bundle.int8 is not None)


def load_float(bundle: Bundle, *, num_parallel: int, use_gpu: bool) -> "OpenVINOEngine":
    """As `load`, but the model with float weights."""
    return _load(bundle, num_parallel, use_gpu, is_int8=False)


def _load(bundle: Bundle, num_parallel: int, use_gpu: bool, *, is_int8: bool) -> "OpenVINOEngine":
    if use_gpu:
        raise UsageError("--use-gpu needs --engine tensorflow, or auto. Received: openvino, which computes on CPUs")
    names = ir_names("int8" if is_int8 else "float")
    if missing := [name for name in names.values() if name not in bundle.paths]:
        raise BundleError(
            "the openvino engine needs a bundle with its files, which `catdog convert` adds. "
            f"Received: {bundle.url} without {missing[0]}"
        )
    ir = {suffix: bundle.paths[name].read_bytes() for suffix, name in names.items()}
    try:
        return OpenVINOEngine(ir, bundle.image_size, is_int8=is_int8, num_parallel=num_parallel)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise BundleError(
            f"{names['xml']} must be a model in OpenVINO's IR. Received: {bundle.url}: {reason}"
        ) from error


class OpenVINOEngine:
    """An engine, see `catdog.engines.Engine`."""

    name: Final = "openvino"

    def __init__(self, ir: IR, image_size: int, *, is_int8: bool, num_parallel: int = 1) -> None:
        has_bfloat16 = hardware.has_bfloat16() and not is_int8
        self.arithmetic: Arithmetic = "int8" if is_int8 else "bfloat16" if has_bfloat16 else "float32"
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if has_bfloat16 else "f32",
            "NUM_STREAMS": num_parallel,
            "INFERENCE_NUM_THREADS": num_parallel,
            "ENABLE_CPU_PINNING": False,
        }
        compiled = openvino_ir.load_openvino().Core().compile_model(openvino_ir.read_ir(ir), "CPU", settings)
        self._num_outputs = len(compiled.outputs)
        self._free: queue.SimpleQueue[object] = queue.SimpleQueue()
        for _ in range(num_parallel):
            self._free.put(compiled.create_infer_request())
        self.batch_size = BATCH_SIZE
        """Largest number of images per request."""
        if not self._ignores_batch(golden_images(image_size)[:BATCH_SIZE]):
            self.batch_size = 1

    def _ignores_batch(self, images_BHWC: npt.NDArray[np.uint8]) -> bool:
        """Whether the last of these images gets the same outputs, to the last bit, alone and in a full batch."""
        together, alone = self.outputs(images_BHWC), self.outputs(images_BHWC[-1:])
        return all(np.array_equal(a[-1], b[-1]) for a, b in zip(together, alone, strict=True))

    def predict(self, images_BHWC: npt.NDArray[np.uint8]) -> Outputs:
        """See `catdog.engines.Engine`."""
        logits_B, *scores = self.outputs(images_BHWC) if len(images_BHWC) else [_NOTHING] * self._num_outputs
        return Outputs(logits_B, scores[0] if scores else None)

    def outputs(self, images_BHWC: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        """All outputs of the model, each with an entry for each of the images, of which there is at least one."""
        parts = []
        request = self._free.get()
        try:
            for start in range(0, len(images_BHWC), self.batch_size):
                parts.append(self._infer(request, images_BHWC[start : start + self.batch_size]))
        finally:
            self._free.put(request)
        return [np.concatenate(output) for output in zip(*parts, strict=True)]

    def _infer(self, request: Any, images_BHWC: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        request.infer([np.ascontiguousarray(images_BHWC)], share_inputs=True)
        return [np.array(request.get_output_tensor(index).data, np.float32) for index in range(self._num_outputs)]
