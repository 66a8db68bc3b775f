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

class GetExpertLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("calls", "assignments", "balancedness", "ceiling", "of_ceiling", "long_run", "worst_layer", "worst_balancedness", "rounds", "most_rounds", "exchanged_bytes", "layers")
    CALLS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENTS_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    OF_CEILING_FIELD_NUMBER: _ClassVar[int]
    LONG_RUN_FIELD_NUMBER: _ClassVar[int]
    WORST_LAYER_FIELD_NUMBER: _ClassVar[int]
    WORST_BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MOST_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EXCHANGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    calls: int
    assignments: int
    balancedness: float
    ceiling: float
    of_ceiling: float
    long_run: float
    worst_layer: int
    worst_balancedness: float
    rounds: float
    most_rounds: int
    exchanged_bytes: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    def __init__(self, calls: _Optional[int] = ..., assignments: _Optional[int] = ..., balancedness: _Optional[float] = ..., ceiling: _Optional[float] = ..., of_ceiling: _Optional[float] = ..., long_run: _Optional[float] = ..., worst_layer: _Optional[int] = ..., worst_balancedness: _Optional[float] = ..., rounds: _Optional[float] = ..., most_rounds: _Optional[int] = ..., exchanged_bytes: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ...) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("layer", "experts", "average", "copies")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    average: _containers.RepeatedScalarFieldContainer[float]
    copies: _containers.RepeatedCompositeFieldContainer[DeviceLoads]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., average: _Optional[_Iterable[float]] = ..., copies: _Optional[_Iterable[_Union[DeviceLoads, _Mapping]]] = ...) -> None: ...

class DeviceLoads(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, devices: _Optional[_Iterable[int]] = ...) -> None: ...

class StartRebalanceRequest(_message.Message):
    __slots__ = ("mixtures",)
    MIXTURES_FIELD_NUMBER: _ClassVar[int]
    mixtures: _containers.RepeatedCompositeFieldContainer[MixturePlacement]
    def __init__(self, mixtures: _Optional[_Iterable[_Union[MixturePlacement, _Mapping]]] = ...) -> None: ...

class GetRebalanceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Rebalance(_message.Message):
    __slots__ = ("trigger", "outcome", "reason", "looked_at", "moved_layers", "moved_experts", "moved_bytes", "steps", "seconds", "moving_seconds", "worst_step_seconds", "worst_moving_seconds", "usual_step_seconds", "before", "after")
    TRIGGER_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LOOKED_AT_FIELD_NUMBER: _ClassVar[int]
    MOVED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MOVED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MOVING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORST_STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WORST_MOVING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    USUAL_STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    trigger: str
    outcome: str
    reason: str
    looked_at: int
    moved_layers: int
    moved_experts: int
    moved_bytes: int
    steps: int
    seconds: float
    moving_seconds: float
    worst_step_seconds: float
    worst_moving_seconds: float
    usual_step_seconds: float
    before: float
    after: float
    def __init__(self, trigger: _Optional[str] = ..., outcome: _Optional[str] = ..., reason: _Optional[str] = ..., looked_at: _Optional[int] = ..., moved_layers: _Optional[int] = ..., moved_experts: _Optional[int] = ..., moved_bytes: _Optional[int] = ..., steps: _Optional[int] = ..., seconds: _Optional[float] = ..., moving_seconds: _Optional[float] = ..., worst_step_seconds: _Optional[float] = ..., worst_moving_seconds: _Optional[float] = ..., usual_step_seconds: _Optional[float] = ..., before: _Optional[float] = ..., after: _Optional[float] = ...) -> None: ...

class SavePlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SavePlacementResponse(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

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

class RoutedTokens(_message.Message):
    __slots__ = ("routed_experts",)
    ROUTED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    routed_experts: RoutedExperts
    def __init__(self, routed_experts: _Optional[_Union[RoutedExperts, _Mapping]] = ...) -> None: ...

class RoutedExperts(_message.Message):
    __slots__ = ("start", "layers", "k", "experts")
    START_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    start: int
    layers: int
    k: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[int] = ..., layers: _Optional[int] = ..., k: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...
