from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PredictRequest(_message.Message):
    __slots__ = ("image", "options")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    options: PredictOptions
    def __init__(self, image: _Optional[bytes] = ..., options: _Optional[_Union[PredictOptions, _Mapping]] = ...) -> None: ...

class PredictOptions(_message.Message):
    __slots__ = ("boxes_for", "overlay", "cam")
    BOXES_FOR_FIELD_NUMBER: _ClassVar[int]
    OVERLAY_FIELD_NUMBER: _ClassVar[int]
    CAM_FIELD_NUMBER: _ClassVar[int]
    boxes_for: FindingSelection
    overlay: bool
    cam: bool
    def __init__(self, boxes_for: _Optional[_Union[FindingSelection, _Mapping]] = ..., overlay: bool = ..., cam: bool = ...) -> None: ...

class FindingSelection(_message.Message):
    __slots__ = ("findings",)
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, findings: _Optional[_Iterable[str]] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("prediction", "manifest_sha256", "overlay_png", "cam")
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    OVERLAY_PNG_FIELD_NUMBER: _ClassVar[int]
    CAM_FIELD_NUMBER: _ClassVar[int]
    prediction: Prediction
    manifest_sha256: str
    overlay_png: bytes
    cam: ClassActivationMaps
    def __init__(self, prediction: _Optional[_Union[Prediction, _Mapping]] = ..., manifest_sha256: _Optional[str] = ..., overlay_png: _Optional[bytes] = ..., cam: _Optional[_Union[ClassActivationMaps, _Mapping]] = ...) -> None: ...

class PredictStreamRequest(_message.Message):
    __slots__ = ("id", "image", "options")
    ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    id: str
    image: bytes
    options: PredictOptions
    def __init__(self, id: _Optional[str] = ..., image: _Optional[bytes] = ..., options: _Optional[_Union[PredictOptions, _Mapping]] = ...) -> None: ...

class PredictStreamResponse(_message.Message):
    __slots__ = ("answer",)
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    answer: ImageAnswer
    def __init__(self, answer: _Optional[_Union[ImageAnswer, _Mapping]] = ...) -> None: ...

class ImageAnswer(_message.Message):
    __slots__ = ("id", "response", "failure")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    id: str
    response: PredictResponse
    failure: Failure
    def __init__(self, id: _Optional[str] = ..., response: _Optional[_Union[PredictResponse, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "error", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    error: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., error: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class PredictStudyRequest(_message.Message):
    __slots__ = ("images", "options")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[StudyImage]
    options: PredictOptions
    def __init__(self, images: _Optional[_Iterable[_Union[StudyImage, _Mapping]]] = ..., options: _Optional[_Union[PredictOptions, _Mapping]] = ...) -> None: ...

class StudyImage(_message.Message):
    __slots__ = ("id", "image")
    ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    id: str
    image: bytes
    def __init__(self, id: _Optional[str] = ..., image: _Optional[bytes] = ...) -> None: ...

class PredictStudyResponse(_message.Message):
    __slots__ = ("answers", "findings", "manifest_sha256")
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[ImageAnswer]
    findings: _containers.RepeatedCompositeFieldContainer[StudyFinding]
    manifest_sha256: str
    def __init__(self, answers: _Optional[_Iterable[_Union[ImageAnswer, _Mapping]]] = ..., findings: _Optional[_Iterable[_Union[StudyFinding, _Mapping]]] = ..., manifest_sha256: _Optional[str] = ...) -> None: ...

class StudyFinding(_message.Message):
    __slots__ = ("finding", "probability", "reported", "image")
    FINDING_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    REPORTED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    finding: str
    probability: float
    reported: bool
    image: int
    def __init__(self, finding: _Optional[str] = ..., probability: _Optional[float] = ..., reported: bool = ..., image: _Optional[int] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("width", "height", "backend", "precision", "findings", "boxes")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    backend: str
    precision: str
    findings: _containers.RepeatedCompositeFieldContainer[Finding]
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., backend: _Optional[str] = ..., precision: _Optional[str] = ..., findings: _Optional[_Iterable[_Union[Finding, _Mapping]]] = ..., boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("finding", "probability", "logit", "reported")
    FINDING_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    REPORTED_FIELD_NUMBER: _ClassVar[int]
    finding: str
    probability: float
    logit: float
    reported: bool
    def __init__(self, finding: _Optional[str] = ..., probability: _Optional[float] = ..., logit: _Optional[float] = ..., reported: bool = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("finding", "x", "y", "width", "height", "score", "peak")
    FINDING_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PEAK_FIELD_NUMBER: _ClassVar[int]
    finding: str
    x: float
    y: float
    width: float
    height: float
    score: float
    peak: Point
    def __init__(self, finding: _Optional[str] = ..., x: _Optional[float] = ..., y: _Optional[float] = ..., width: _Optional[float] = ..., height: _Optional[float] = ..., score: _Optional[float] = ..., peak: _Optional[_Union[Point, _Mapping]] = ...) -> None: ...

class Point(_message.Message):
    __slots__ = ("x", "y")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    x: float
    y: float
    def __init__(self, x: _Optional[float] = ..., y: _Optional[float] = ...) -> None: ...

class ClassActivationMaps(_message.Message):
    __slots__ = ("count", "height", "width", "values")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    count: int
    height: int
    width: int
    values: bytes
    def __init__(self, count: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("manifest_sha256", "labels", "network", "activation", "preprocess", "boxes", "operating_points", "backend", "precision", "producer", "files", "server_version", "activation_thresholds")
    class ProducerEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: File
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[File, _Mapping]] = ...) -> None: ...
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    OPERATING_POINTS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    manifest_sha256: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    network: Network
    activation: str
    preprocess: Preprocess
    boxes: BoxSpec
    operating_points: _containers.RepeatedCompositeFieldContainer[OperatingPoint]
    backend: str
    precision: str
    producer: _containers.ScalarMap[str, str]
    files: _containers.MessageMap[str, File]
    server_version: str
    activation_thresholds: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, manifest_sha256: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., network: _Optional[_Union[Network, _Mapping]] = ..., activation: _Optional[str] = ..., preprocess: _Optional[_Union[Preprocess, _Mapping]] = ..., boxes: _Optional[_Union[BoxSpec, _Mapping]] = ..., operating_points: _Optional[_Iterable[_Union[OperatingPoint, _Mapping]]] = ..., backend: _Optional[str] = ..., precision: _Optional[str] = ..., producer: _Optional[_Mapping[str, str]] = ..., files: _Optional[_Mapping[str, File]] = ..., server_version: _Optional[str] = ..., activation_thresholds: _Optional[_Iterable[float]] = ...) -> None: ...

class Network(_message.Message):
    __slots__ = ("name", "cam_height", "cam_width", "bias", "checkpoint_sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAM_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    CAM_WIDTH_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    cam_height: int
    cam_width: int
    bias: _containers.RepeatedScalarFieldContainer[float]
    checkpoint_sha256: str
    def __init__(self, name: _Optional[str] = ..., cam_height: _Optional[int] = ..., cam_width: _Optional[int] = ..., bias: _Optional[_Iterable[float]] = ..., checkpoint_sha256: _Optional[str] = ...) -> None: ...

class Preprocess(_message.Message):
    __slots__ = ("exact", "shorter", "crop", "filter", "input_size", "square")
    EXACT_FIELD_NUMBER: _ClassVar[int]
    SHORTER_FIELD_NUMBER: _ClassVar[int]
    CROP_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    SQUARE_FIELD_NUMBER: _ClassVar[int]
    exact: ExactSize
    shorter: int
    crop: int
    filter: str
    input_size: int
    square: bool
    def __init__(self, exact: _Optional[_Union[ExactSize, _Mapping]] = ..., shorter: _Optional[int] = ..., crop: _Optional[int] = ..., filter: _Optional[str] = ..., input_size: _Optional[int] = ..., square: bool = ...) -> None: ...

class ExactSize(_message.Message):
    __slots__ = ("width", "height")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class BoxSpec(_message.Message):
    __slots__ = ("threshold", "per_finding", "min_area", "max_per_finding")
    class PerFindingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    PER_FINDING_FIELD_NUMBER: _ClassVar[int]
    MIN_AREA_FIELD_NUMBER: _ClassVar[int]
    MAX_PER_FINDING_FIELD_NUMBER: _ClassVar[int]
    threshold: float
    per_finding: _containers.ScalarMap[str, float]
    min_area: float
    max_per_finding: int
    def __init__(self, threshold: _Optional[float] = ..., per_finding: _Optional[_Mapping[str, float]] = ..., min_area: _Optional[float] = ..., max_per_finding: _Optional[int] = ...) -> None: ...

class OperatingPoint(_message.Message):
    __slots__ = ("finding", "probability", "method", "data", "sensitivity", "specificity")
    FINDING_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SENSITIVITY_FIELD_NUMBER: _ClassVar[int]
    SPECIFICITY_FIELD_NUMBER: _ClassVar[int]
    finding: str
    probability: float
    method: str
    data: str
    sensitivity: float
    specificity: float
    def __init__(self, finding: _Optional[str] = ..., probability: _Optional[float] = ..., method: _Optional[str] = ..., data: _Optional[str] = ..., sensitivity: _Optional[float] = ..., specificity: _Optional[float] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("sha256", "size")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    size: int
    def __init__(self, sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...
