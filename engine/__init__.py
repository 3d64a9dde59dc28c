"""Bytes -> radiograph -> network input -> raw outputs -> findings and boxes.

Needs numpy, Pillow, pydicom, imagecodecs, OpenCV, msgspec and one backend; never torch, onnx or gRPC.
"""
