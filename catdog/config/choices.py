"""The values among which a flag chooses."""

from typing import Literal

Split = Literal["test", "val", "train"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Executor = Literal["auto", "inline", "ray"]
EngineName = Literal["auto", "openvino", "openvino-float", "tensorflow"]
