"""Every error thoraxrt raises on purpose, in one tree.

    ThoraxrtError
    ├── ImageError                   one image cannot be answered; others can
    │   ├── ImageFormatError         not an image we read, truncated, or corrupt
    │   ├── ImageLimitError          too many bytes or pixels, or a shape no radiograph has
    │   └── ImageContentError        readable, but not one frontal grayscale radiograph
    ├── BundleError                  the bundle is missing, damaged, or of another schema
    │   ├── PlanError                a compiled plan is missing, damaged or vouched for by nobody, or cannot be kept
    │   └── SignatureError           no trusted key vouches for it, or a key cannot be used
    ├── CheckpointError              the checkpoint cannot be read or fits no known network
    ├── ConfigError                  a server's configuration holds what it cannot be run with
    ├── DatasetError                 a data set folder does not hold what its layout promises
    ├── BackendError                 inference failed, or the runtime broke
    │   ├── BackendUnavailableError  the backend or precision cannot run on this machine
    │   ├── DeviceError              the GPU failed; what was in flight there has no answer
    │   │   └── DeviceMemoryError    the GPU's memory, or page-locked host memory, is used up
    │   └── NotFiniteError           this image's answer holds a NaN or an infinity; others need not
    ├── RequestError                 an option or argument that makes no sense for this model
    │   └── ModelNotFoundError       the server has no such model or version
    ├── AccessError                  the server does not let this client do this
    │   ├── AuthenticationError      no credentials, or none that it takes
    │   └── AuthorizationError       known, but without the role that this call needs
    ├── OverloadedError              the server has more to do than it can answer in time
    ├── DeadlineError                the deadline passed before the answer was there
    └── ServerError                  the server could not be reached or did not answer
        └── AuditError               the audit log cannot be kept, or is not what was written

A message says what was received, what was expected and what to do. Image content and patient
data never appear in a message. This module knows neither exit statuses (`thoraxrt.cli`) nor
gRPC codes (`thoraxrt.server.status`).
"""

__all__ = [
    "AccessError",
    "AuditError",
    "AuthenticationError",
    "AuthorizationError",
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DeadlineError",
    "DeviceError",
    "DeviceMemoryError",
    "ImageContentError",
    "ImageError",
    "ImageFormatError",
    "ImageLimitError",
    "ModelNotFoundError",
    "NotFiniteError",
    "OverloadedError",
    "PlanError",
    "RequestError",
    "ServerError",
    "SignatureError",
    "ThoraxrtError",
]


class ThoraxrtError(Exception):
    """The root: everything thoraxrt raises on purpose."""


class ImageError(ThoraxrtError):
    """One image cannot be answered; the others of the batch can."""


class ImageFormatError(ImageError):
    """The bytes are no image we read, or are truncated or corrupt."""


class ImageLimitError(ImageError):
    """The image exceeds a limit on bytes or pixels, or has a shape that no radiograph has."""


class ImageContentError(ImageError):
    """The image is readable but is not a single grayscale radiograph."""


class BundleError(ThoraxrtError):
    """The bundle is missing, damaged, or written for another schema version."""


class PlanError(BundleError):
    """A compiled plan is missing, damaged or vouched for by nobody, or cannot be kept."""


class SignatureError(BundleError):
    """No trusted key signed this bundle or plan, or a key cannot be used."""


class CheckpointError(ThoraxrtError):
    """The checkpoint cannot be read safely, or its weights fit no network that we know."""


class ConfigError(ThoraxrtError):
    """A server's configuration (file, environment or flags) holds what it cannot be run with."""


class DatasetError(ThoraxrtError):
    """A data set folder does not hold what its layout promises."""


class BackendError(ThoraxrtError):
    """The runtime failed while loading or running the network."""


class BackendUnavailableError(BackendError):
    """The backend, or the asked-for precision on it, cannot run on this machine."""


class DeviceError(BackendError):
    """The GPU failed; what was in flight there has no answer.

    `lost`: the process's context on that GPU is unusable (a sticky error, a lost device), and every
    further call fails until it is opened again; otherwise the next batch may well succeed.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class DeviceMemoryError(DeviceError):
    """The GPU's memory, or page-locked host memory, is used up."""


class NotFiniteError(BackendError):
    """The network's values for this image hold a NaN or an infinity; others need not."""


class RequestError(ThoraxrtError):
    """An option or argument that makes no sense for this model, an unknown finding say."""


class ModelNotFoundError(RequestError):
    """The server has no model, or no version of it, by that name."""


class AccessError(ThoraxrtError):
    """The server does not let this client do this."""


class AuthenticationError(AccessError):
    """The call brought no credentials, or none that the server takes."""


class AuthorizationError(AccessError):
    """The client is known, but lacks the role that this call needs."""


class OverloadedError(ThoraxrtError):
    """The server has more to do than it can answer in time; `retry_after_s` seconds from now it may have less."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(ThoraxrtError):
    """The deadline passed, or would have passed, before the answer was there."""


class ServerError(ThoraxrtError):
    """The server could not be reached, or answered with something other than a result."""


class AuditError(ServerError):
    """The audit log cannot be written, so that there is no answer; or it is not what was written."""
