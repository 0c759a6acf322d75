"""The ONNX door: a model whose attention becomes operators that ONNX and ONNX Runtime know.

`onnx`, `onnxscript` and `onnxruntime` are imported when `export` is called, not before.
"""

from attnopt.onnx.door import export

__all__ = ["export"]
