"""The CUDA path: geometry, network and boxes of a batch in one graph launch, nothing between them on the host."""
