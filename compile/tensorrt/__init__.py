"""The TensorRT targets: networks, weight forms and plans, for tensorrt and tensorrt_rtx alike."""
