"""FP16 graphs: types as promised, and which nodes stay in FP32, against FP16 rounding made explicit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import decode
from thoraxrt.engine.errors import DatasetError, RequestError
from thoraxrt.engine.preprocess import network_input
from thoraxrt.export.graph import session_from_graph
from thoraxrt.export.half import _fewest, emulation_from_fp16, fp16_by_measurement, fp16_from_fp32

# Operators of networks made elsewhere: gates, Clips that share a bound, shape arithmetic in float.
TRUNK = """
    pixels = Cast <to = 1> (image)
    scaled = Mul (pixels, scale)
    stem = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (scaled, stem_weight, stem_bias)
    norm = BatchNormalization (stem, gamma, beta, mean, variance)
    swish = HardSwish (norm)
    six = Constant <value = float {6}> ()
    clip = Clip (swish, zero, six)
    depthwise = Conv <group = 8, pads = [1, 1, 1, 1]> (clip, depthwise_weight)
    squeeze = GlobalAveragePool (depthwise)
    flat = Reshape (squeeze, flat_shape)
    fc1 = Gemm <transB = 1> (flat, fc1_weight, fc1_bias)
    relu = Clip (fc1, zero)
    fc2 = MatMul (relu, fc2_weight)
    gate = Sigmoid (fc2)
    gate_map = Unsqueeze (gate, axes)
    gated = Mul (depthwise, gate_map)
    channels_last = Transpose <perm = [0, 2, 3, 1]> (gated)
    channels_first = Transpose <perm = [0, 3, 1, 2]> (channels_last)
    batch = Shape <start = 0, end = 2> (gated)
    size = Shape <start = 2> (gated)
    size_float = Cast <to = 1> (size)
    one_half = Constant <value = float[1] {0.5}> ()
    half_size_float = Mul (size_float, one_half)
    half_size = Cast <to = 7> (half_size_float)
    sizes = Concat <axis = 0> (batch, half_size)
    small = Resize <mode = "linear"> (channels_first, , , sizes)
    large = Resize <mode = "nearest"> (small, , scales)
    joined = Concat <axis = 1> (large, gated)
    features = Relu (joined)
"""
HEAD = """
    map = Conv (features, cam_weight)
    cam = Mul (map, scale)
    pooled = ReduceMean <keepdims = 0> (cam, axes)
    logits = Add (pooled, bias)
"""
SHAPE_ARITHMETIC = ("size_float", "half_size_float")
IN_FP32 = {"size_float", "half_size_float", "map", "cam", "pooled", "logits"}
KEEPABLE = (
    "pixels", "scaled", "stem", "norm", "swish", "clip", "depthwise", "squeeze", "flat", "fc1", "relu", "fc2", "gate",
    "gate_map", "gated", "channels_last", "channels_first", "small", "large", "joined", "features",
)  # fmt: skip
IMAGES = np.stack([np.random.default_rng(0).integers(0, high, (1, 16, 16), np.uint8) for high in (16, 64, 256)])


def served(trunk: str, weights: dict[str, np.ndarray], head: str = HEAD) -> onnx.ModelProto:
    """A served graph `image` uint8 `(N, 1, 16, 16)` to `logits (N, 3)` and `cam (N, 3, h, w)`, in ONNX's own text."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18, "other": 1]> served (uint8[N, 1, 16, 16] image)'
        f" => (float[N, 3] logits, float[N, 3, H, W] cam) {{ {trunk} {head} }}"
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = {
        "stem_weight": (8, 1, 3, 3), "stem_bias": (8,), "gamma": (8,), "beta": (8,), "mean": (8,),
        "depthwise_weight": (8, 1, 3, 3), "fc1_weight": (4, 8), "fc1_bias": (4,), "fc2_weight": (4, 8),
        "cam_weight": (3, 16, 1, 1), "bias": (3,),
    }  # fmt: skip
    drawn = {name: rng.normal(0, 0.7, shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {
        "scale": np.float32(1 / 16),
        "variance": np.ones(8, np.float32),
        "zero": np.float32(0),
        "flat_shape": np.array([0, -1]),
        "axes": np.array([2, 3]),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Each tensor's element type, by name."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    known = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info, *graph.output]}
    return known | {weight.name: weight.data_type for weight in graph.initializer}


def logits(model: onnx.ModelProto, images: np.ndarray = IMAGES) -> np.ndarray:
    return session_from_graph(model.SerializeToString()).run(["logits"], {"image": images})[0]


@given(keep=st.sets(st.sampled_from(KEEPABLE)))
@settings(max_examples=25, deadline=None)
def test_each_node_has_the_type_it_was_given(keep: set[str]) -> None:
    model = served(TRUNK, weights())
    half = fp16_from_fp32(model, keep)
    found = types(half)
    for name, before in types(model).items():
        if name in KEEPABLE:
            assert found[name] == (TensorProto.FLOAT if name in keep else TensorProto.FLOAT16), name
        elif name in IN_FP32:
            assert found[name] == TensorProto.FLOAT, name
        elif before != TensorProto.FLOAT or name == "scales":  # Resize has its scales in FP32 always
            assert found[name] == before, name
    casts = [(node.input[0], found[node.output[0]]) for node in half.graph.node if node.op_type == "Cast"]
    assert len(set(casts)) == len(casts)  # one per tensor and direction
    assert not [name for name, to in casts if found[name] == to or name == "six"]  # constants need none
    assert all(node.input[0] == "gated" for node in half.graph.node if node.op_type == "Shape")  # nor do shapes
    np.testing.assert_allclose(logits(emulation_from_fp16(half)), logits(model), atol=0.005, rtol=0)
    assert np.ptp(logits(model), axis=0).min() > 0.2  # else agreement would say nothing


# None more than doubles: twelve stay far below 65504.
STEPS = (
    "Relu ({0})", "Sigmoid ({0})", "HardSwish ({0})", "Clip ({0}, zero, scale)", "Mul ({0}, scale)", "Add ({0}, {1})",
    "Mul ({0}, level)", "Conv <pads = [1, 1, 1, 1]> ({0}, weight, beta)", "ReduceMean <keepdims = 1> ({0}, axes)",
)  # fmt: skip


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0), st.integers(0), st.booleans()), min_size=1, max_size=12
    )
)
@settings(max_examples=40, deadline=None)
def test_any_graph_is_typed_as_asked(steps: list[tuple[str, int, int, bool]]) -> None:
    names = ["level", *(f"step{index}" for index in range(len(steps)))]
    lines = [
        f"{names[i + 1]} = {step.format(names[a % (i + 1)], names[b % (i + 1)])}"
        for i, (step, a, b, _) in enumerate(steps)
    ]
    trunk = [
        "pixels = Cast <to = 1> (image)",
        "level = Mul (pixels, scale)",
        *lines,
        f"features = Sum ({', '.join(names)})",
    ]
    drawn = {
        "weight": np.full((1, 1, 3, 3), 0.1, np.float32),
        "beta": np.full(1, 0.1, np.float32),
        "zero": np.float32(0),
    }
    drawn |= {"cam_weight": np.ones((3, 1, 1, 1), np.float32), "bias": np.zeros(3, np.float32)}
    model = served("\n".join(trunk), drawn | {"scale": np.float32(1 / 256), "axes": np.array([2, 3])})
    keep = {names[i + 1] for i, (*_, kept) in enumerate(steps) if kept}
    half = fp16_from_fp32(model, keep)
    found = types(half)
    for name in names:
        assert found[name] == (TensorProto.FLOAT if name in keep else TensorProto.FLOAT16), name
    np.testing.assert_allclose(logits(emulation_from_fp16(half)), logits(model), atol=1e-3, rtol=1e-2)
    np.testing.assert_allclose(logits(half), logits(model), atol=1e-3, rtol=1e-2)  # ONNX Runtime takes it as it is


def test_the_same_graph_gives_the_same_bytes() -> None:
    first, second = (fp16_from_fp32(served(TRUNK, weights()), {"fc1", "norm", "large"}) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("name", "value"), [("stem_weight", 1e5), ("gamma", 1e-6)], ids=["beyond 65504", "below 6.1e-5"]
)
def test_a_weight_that_fp16_cannot_hold_keeps_its_node(name: str, value: float) -> None:
    drawn = weights()
    drawn[name] = np.full_like(drawn[name], value)
    found = types(fp16_from_fp32(served(TRUNK, drawn)))
    kept = {"stem_weight": "stem", "gamma": "norm"}[name]
    assert [node for node in KEEPABLE if found[node] == TensorProto.FLOAT] == [kept]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("features = other.Gelu (pixels)", "no standard ONNX operator"),
        (
            """
            features = If (yes) <
                then_branch = a () => (float[N, 1, 16, 16] b) { b = Relu (pixels) },
                else_branch = c () => (float[N, 1, 16, 16] d) { d = Identity (pixels) }
            >
            """,
            "is control flow",
        ),
        ("features = Relu (pixels) cam = Concat <axis = 1> (features, features, features)", "from no Conv"),
    ],
    ids=["foreign operator", "control flow", "no CAM convolution"],
)
def test_what_cannot_be_converted_is_refused(features: str, message: str) -> None:
    drawn = {"cam_weight": np.ones((3, 1, 1, 1), np.float32), "bias": np.zeros(3, np.float32), "scale": np.float32(1)}
    head = HEAD if "cam" not in features else HEAD[HEAD.index("pooled") :]
    trunk = f"pixels = Cast <to = 1> (image) {features}"
    model = served(trunk, drawn | {"axes": np.array([2, 3]), "yes": np.array(True)}, head)
    with pytest.raises(RequestError, match=message):
        fp16_from_fp32(model)


def test_a_name_that_is_no_node_is_refused() -> None:
    with pytest.raises(RequestError, match="first output stm"):
        fp16_from_fp32(served(TRUNK, weights()), {"stm"})


def meets(fp16: np.ndarray, fp32: np.ndarray) -> bool:
    """An accuracy bar."""
    return float(np.abs(fp16 - fp32).max()) <= 0.02 * float(np.ptp(fp32))


def test_the_emulation_rounds_after_every_node_as_numpy_does() -> None:
    trunk = """
        pixels = Cast <to = 1> (image)
        a = Mul (pixels, third)
        b = Mul (a, third)
        features = Mul (b, third)
    """
    drawn = {"third": np.float32(1 / 3), "cam_weight": np.ones((3, 1, 1, 1), np.float32), "scale": np.float32(1)}
    drawn |= {"axes": np.array([2, 3]), "bias": np.zeros(3, np.float32)}
    emulated = emulation_from_fp16(fp16_from_fp32(served(trunk, drawn)))
    expected = IMAGES.astype(np.float16)
    for _ in range(3):
        expected = expected * np.float16(1 / 3)  # numpy rounds each product
    cam = session_from_graph(emulated.SerializeToString()).run(["cam"], {"image": IMAGES})[0]
    np.testing.assert_array_equal(cam[:, :1], expected.astype(np.float32))


# Three convolutions; the second may reach far, or carry its signal on a large offset.
CHAIN = """
    pixels = Cast <to = 1> (image)
    first = Conv <pads = [1, 1, 1, 1]> (pixels, first_weight)
    first_relu = Relu (first)
    second = Conv <pads = [1, 1, 1, 1]> (first_relu, second_weight)
    raised = Add (second, offset)
    lowered = Sub (raised, offset)
    second_relu = Relu (lowered)
    third = Conv <pads = [1, 1, 1, 1]> (second_relu, third_weight)
    features = Relu (third)
"""


# In place of the offset: (a x) ((a x) / (a a x)) is x, unless a a x vanishes.
VANISHING = CHAIN.replace(
    """
    raised = Add (second, offset)
    lowered = Sub (raised, offset)
""",
    """
    tiny = Mul (second, offset)
    tinier = Mul (tiny, offset)
    inverse = Div (tiny, tinier)
    lowered = Mul (inverse, tiny)
""",
)


def chain(gain: float, offset: float, trunk: str = CHAIN) -> onnx.ModelProto:
    """`gain` is the second convolution's, which the third takes back."""
    rng = np.random.default_rng(2)
    shapes = {
        "first_weight": (4, 1, 3, 3),
        "second_weight": (4, 4, 3, 3),
        "third_weight": (4, 4, 3, 3),
        "cam_weight": (3, 4, 1, 1),
    }
    drawn = {name: rng.uniform(-0.05, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    drawn["second_weight"] *= np.float32(gain)
    drawn["third_weight"] /= np.float32(gain)
    drawn |= {"offset": np.float32(offset), "scale": np.float32(1 / 64), "axes": np.array([2, 3])}
    return served(trunk, drawn | {"bias": np.zeros(3, np.float32)})


def test_a_healthy_network_keeps_nothing_after_one_comparison() -> None:
    calls = []
    half = fp16_by_measurement(chain(1, 0), lambda: IMAGES, lambda *pair: bool(calls.append(pair)) or meets(*pair))
    assert half.kept == ()
    assert half.model == fp16_from_fp32(chain(1, 0))
    assert len(calls) == 2  # FP32 with itself, FP16 with FP32


def test_nodes_that_overflow_stay_in_fp32_and_accuracy_returns() -> None:
    model = chain(200, 0)
    plain = session_from_graph(emulation_from_fp16(fp16_from_fp32(model)).SerializeToString())
    assert not np.isfinite(plain.run(["logits"], {"image": IMAGES})[0]).all()
    half = fp16_by_measurement(model, lambda: IMAGES, meets)
    assert half.kept == ("second", "raised", "lowered", "second_relu", "third")
    assert all("reaches" in reason for reason in half.why.values())
    found = logits(emulation_from_fp16(half.model))
    np.testing.assert_allclose(found, logits(model), atol=0.02 * np.ptp(logits(model)), rtol=0)


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        # FP16 counts by eights at 15,000, and the signal spans seven.
        (chain(0.02, 15_000), ("second", "raised", "lowered", "second_relu")),
        (chain(0.02, 1e-4, VANISHING), ("second", "tiny", "tinier", "inverse", "lowered", "second_relu")),
    ],
    ids=["cancellation", "infinity"],
)
def test_the_search_keeps_only_the_group_that_costs_accuracy(model: onnx.ModelProto, kept: tuple[str, ...]) -> None:
    plain = logits(emulation_from_fp16(fp16_from_fp32(model)))
    assert not (np.isfinite(plain).all() and meets(plain, logits(model)))
    half = fp16_by_measurement(model, lambda: IMAGES, meets)
    assert half.kept == kept
    assert meets(logits(emulation_from_fp16(half.model)), logits(model))


@given(count=st.integers(1, 40), needed=st.integers(1, 40))
def test_the_fewest_is_found_and_all_is_never_tried(count: int, needed: int) -> None:
    needed, tried = min(count, needed), []
    assert _fewest(count, lambda n: bool(tried.append(n)) or n >= needed) == needed
    assert count not in tried
    assert len(tried) <= 2 * count.bit_length()


def test_measuring_needs_images_and_a_bar_that_fp32_meets() -> None:
    with pytest.raises(DatasetError, match="no calibration image"):
        fp16_by_measurement(chain(1, 0), lambda: [], meets)
    with pytest.raises(RequestError, match="misses the accuracy bar"):
        fp16_by_measurement(chain(1, 0), lambda: IMAGES, lambda *_: False)


def test_the_real_network_is_healthy(chexnet_bundle: Bundle, nih_images: list[Path]) -> None:
    def images() -> Iterator[np.ndarray]:
        for path in nih_images[::140]:
            yield network_input(decode(path.read_bytes()).pixels, chexnet_bundle.manifest.preprocess)

    def close(fp16: np.ndarray, fp32: np.ndarray) -> bool:
        return bool(np.abs(fp16 - fp32).max() < 0.01)

    half = fp16_by_measurement(onnx.load_model_from_string(chexnet_bundle.read("model.fp32.onnx")), images, close)
    assert half.kept == ()
