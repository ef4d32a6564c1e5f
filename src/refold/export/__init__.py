"""Ship a model without refold: ONNX, a torch.export program, or plain weights for timm."""

from __future__ import annotations

from refold.export.common import Exported
from refold.export.detector_file import export_detector
from refold.export.onnx_file import export_onnx
from refold.export.program import export_program
from refold.export.weights import export_weights

__all__ = ["Exported", "export_detector", "export_onnx", "export_program", "export_weights"]
