from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetMeshRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Mesh(_message.Message):
    __slots__ = ("dp", "ep", "tp", "expert_axes", "attention_ranks", "platform", "device_kind", "devices")
    DP_FIELD_NUMBER: _ClassVar[int]
    EP_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    EXPERT_AXES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_RANKS_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    DEVICE_KIND_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    dp: int
    ep: int
    tp: int
    expert_axes: str
    attention_ranks: int
    platform: str
    device_kind: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, dp: _Optional[int] = ..., ep: _Optional[int] = ..., tp: _Optional[int] = ..., expert_axes: _Optional[str] = ..., attention_ranks: _Optional[int] = ..., platform: _Optional[str] = ..., device_kind: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("id", "process", "dp", "ep", "tp", "attention_rank")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    DP_FIELD_NUMBER: _ClassVar[int]
    EP_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_RANK_FIELD_NUMBER: _ClassVar[int]
    id: int
    process: int
    dp: int
    ep: int
    tp: int
    attention_rank: int
    def __init__(self, id: _Optional[int] = ..., process: _Optional[int] = ..., dp: _Optional[int] = ..., ep: _Optional[int] = ..., tp: _Optional[int] = ..., attention_rank: _Optional[int] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Placement(_message.Message):
    __slots__ = ("experts", "slots", "slots_per_device", "mixtures")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_DEVICE_FIELD_NUMBER: _ClassVar[int]
    MIXTURES_FIELD_NUMBER: _ClassVar[int]
    experts: int
    slots: int
    slots_per_device: int
    mixtures: _containers.RepeatedCompositeFieldContainer[MixturePlacement]
    def __init__(self, experts: _Optional[int] = ..., slots: _Optional[int] = ..., slots_per_device: _Optional[int] = ..., mixtures: _Optional[_Iterable[_Union[MixturePlacement, _Mapping]]] = ...) -> None: ...

class MixturePlacement(_message.Message):
    __slots__ = ("layer", "slot_expert")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SLOT_EXPERT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    slot_expert: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., slot_expert: _Optional[_Iterable[int]] = ...) -> None: ...

class GetProgramsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Programs(_message.Message):
    __slots__ = ("programs", "late_compiles")
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    LATE_COMPILES_FIELD_NUMBER: _ClassVar[int]
    programs: _containers.RepeatedCompositeFieldContainer[Program]
    late_compiles: int
    def __init__(self, programs: _Optional[_Iterable[_Union[Program, _Mapping]]] = ..., late_compiles: _Optional[int] = ...) -> None: ...

class Program(_message.Message):
    __slots__ = ("title", "name", "lowering_seconds", "compiling_seconds", "cached", "argument_bytes", "output_bytes", "temporary_bytes", "code_bytes")
    TITLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOWERING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPILING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    ARGUMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEMPORARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODE_BYTES_FIELD_NUMBER: _ClassVar[int]
    title: str
    name: str
    lowering_seconds: float
    compiling_seconds: float
    cached: bool
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    def __init__(self, title: _Optional[str] = ..., name: _Optional[str] = ..., lowering_seconds: _Optional[float] = ..., compiling_seconds: _Optional[float] = ..., cached: bool = ..., argument_bytes: _Optional[int] = ..., output_bytes: _Optional[int] = ..., temporary_bytes: _Optional[int] = ..., code_bytes: _Optional[int] = ...) -> None: ...

class GetMemoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Memory(_message.Message):
    __slots__ = ("weights", "kv_cache_bytes", "temporary_bytes", "devices")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEMPORARY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    weights: _containers.RepeatedCompositeFieldContainer[Weights]
    kv_cache_bytes: int
    temporary_bytes: int
    devices: _containers.RepeatedCompositeFieldContainer[DeviceMemory]
    def __init__(self, weights: _Optional[_Iterable[_Union[Weights, _Mapping]]] = ..., kv_cache_bytes: _Optional[int] = ..., temporary_bytes: _Optional[int] = ..., devices: _Optional[_Iterable[_Union[DeviceMemory, _Mapping]]] = ...) -> None: ...

class Weights(_message.Message):
    __slots__ = ("kind", "bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    bytes: int
    def __init__(self, kind: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class DeviceMemory(_message.Message):
    __slots__ = ("id", "bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    ID_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_USE_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_IN_USE_FIELD_NUMBER: _ClassVar[int]
    BYTES_LIMIT_FIELD_NUMBER: _ClassVar[int]
    id: int
    bytes_in_use: int
    peak_bytes_in_use: int
    bytes_limit: int
    def __init__(self, id: _Optional[int] = ..., bytes_in_use: _Optional[int] = ..., peak_bytes_in_use: _Optional[int] = ..., bytes_limit: _Optional[int] = ...) -> None: ...

class GetCollectivesRequest(_message.Message):
    __slots__ = ("program",)
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    program: str
    def __init__(self, program: _Optional[str] = ...) -> None: ...

class Collectives(_message.Message):
    __slots__ = ("programs",)
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    programs: _containers.RepeatedCompositeFieldContainer[ProgramCollectives]
    def __init__(self, programs: _Optional[_Iterable[_Union[ProgramCollectives, _Mapping]]] = ...) -> None: ...

class ProgramCollectives(_message.Message):
    __slots__ = ("title", "collectives")
    TITLE_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVES_FIELD_NUMBER: _ClassVar[int]
    title: str
    collectives: _containers.RepeatedCompositeFieldContainer[Collective]
    def __init__(self, title: _Optional[str] = ..., collectives: _Optional[_Iterable[_Union[Collective, _Mapping]]] = ...) -> None: ...

class Collective(_message.Message):
    __slots__ = ("count", "kind", "dtype", "shapes", "bytes", "axes", "in_loop")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    IN_LOOP_FIELD_NUMBER: _ClassVar[int]
    count: int
    kind: str
    dtype: str
    shapes: _containers.RepeatedScalarFieldContainer[str]
    bytes: int
    axes: _containers.RepeatedScalarFieldContainer[str]
    in_loop: bool
    def __init__(self, count: _Optional[int] = ..., kind: _Optional[str] = ..., dtype: _Optional[str] = ..., shapes: _Optional[_Iterable[str]] = ..., bytes: _Optional[int] = ..., axes: _Optional[_Iterable[str]] = ..., in_loop: bool = ...) -> None: ...

class GetMetricsRequest(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: str
    def __init__(self, prefix: _Optional[str] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("time", "samples")
    TIME_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    time: float
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    def __init__(self, time: _Optional[float] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("name", "labels", "value")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    value: float
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., value: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("open_requests",)
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    open_requests: int
    def __init__(self, open_requests: _Optional[int] = ...) -> None: ...
