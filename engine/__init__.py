"""Bytes -> radiograph -> network input -> raw outputs -> findings and boxes.

Needs numpy, Pillow, pydicom, OpenCV, msgspec and one backend; never torch, onnx or gRPC.
"""
