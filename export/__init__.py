"""Checkpoint -> network -> ONNX -> bundle; the NIH layout reader and the phantoms."""
