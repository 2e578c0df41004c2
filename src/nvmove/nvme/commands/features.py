"""Get and Set Features (Base 5.27.1).

No value outlives a controller level reset, and none can be saved: what "saved" asks for is the default. A feature that
QEMU's nvme does not let the guest change is fixed here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nvmove.block.backend import Operation
from nvmove.nvme.commands import failures, notices
from nvmove.nvme.commands.batch import Batch, Failure, Part
from nvmove.nvme.commands.command import Command, Controller
from nvmove.nvme.errors import CommandError
from nvmove.nvme.features import default_write_cache
from nvmove.nvme.namespace import Namespace, check_nsid
from nvmove.nvme.spec import (
    ALL_NAMESPACES,
    ARBITRATION_NO_LIMIT,
    COALESCING_DISABLE,
    ERROR_RECOVERY_DULBE,
    FEATURE_CHANGEABLE,
    FEATURE_NAMESPACE,
    FEATURE_SAVE,
    HOST_BEHAVIOR_SIZE,
    MAX_NAMESPACES,
    SENSOR_ALL,
    SENSOR_COMPOSITE,
    TEMPERATURE_WARNING,
    THRESHOLD_OVER,
    THRESHOLD_UNDER,
    TIMESTAMP,
    TIMESTAMP_ORIGIN_SHIFT,
    TIMESTAMP_SYNCH,
    Feature,
    Select,
    Status,
)

# --- Get Features ----------------------------------------------------------------------------------------------------


def _zero(_controller: Controller, _cdw11: int) -> int:
    return 0


def _no_limit(_controller: Controller, _cdw11: int) -> int:
    return ARBITRATION_NO_LIMIT


def _number_of_queues(controller: Controller, _cdw11: int) -> int:
    return controller.features.number_of_queues


def _interrupt_coalescing(controller: Controller, _cdw11: int) -> int:
    return controller.features.interrupt_coalescing


def _write_atomicity(controller: Controller, _cdw11: int) -> int:
    return controller.features.write_atomicity


def _async_event(controller: Controller, _cdw11: int) -> int:
    return controller.features.async_event_configuration


def _temperature_threshold(controller: Controller, cdw11: int) -> int:
    sensor, threshold = cdw11 >> 16 & 0xF, cdw11 >> 20 & 3
    if sensor != SENSOR_COMPOSITE:  # there is no other
        return 0
    if threshold not in {THRESHOLD_OVER, THRESHOLD_UNDER}:
        raise CommandError(Status.INVALID_FIELD)
    features = controller.features
    return features.temperature_over if threshold == THRESHOLD_OVER else features.temperature_under


def _default_temperature_threshold(_controller: Controller, cdw11: int) -> int:
    is_composite_over = cdw11 >> 16 & 0xF == SENSOR_COMPOSITE and cdw11 >> 20 & 3 == THRESHOLD_OVER
    return TEMPERATURE_WARNING if is_composite_over else 0


def _vector_configuration(controller: Controller, cdw11: int) -> int:
    vector = cdw11 & 0xFFFF
    disabled = vector == 0 or vector in controller.features.coalescing_disabled
    return _check_vector(controller, vector) | (COALESCING_DISABLE if disabled else 0)


def _default_vector_configuration(controller: Controller, cdw11: int) -> int:
    vector = cdw11 & 0xFFFF
    return _check_vector(controller, vector) | (COALESCING_DISABLE if vector == 0 else 0)


def _check_vector(controller: Controller, vector: int) -> int:
    if vector >= controller.config.max_ioqpairs + 1:
        raise CommandError(Status.INVALID_FIELD)
    return vector


def _timestamp_data(controller: Controller) -> bytes:
    features = controller.features
    synch = TIMESTAMP_SYNCH if features.clock_stood_still else 0
    return TIMESTAMP.pack(features.timestamp | synch | features.timestamp_origin << TIMESTAMP_ORIGIN_SHIFT)


# --- Set Features: each may raise CommandError before it changes anything; called with the lock held -----------------


def _set_temperature_threshold(controller: Controller, command: Command) -> None:
    sensor, threshold = command.cdw11 >> 16 & 0xF, command.cdw11 >> 20 & 3
    if threshold not in {THRESHOLD_OVER, THRESHOLD_UNDER}:
        raise CommandError(Status.INVALID_FIELD)
    if sensor not in {SENSOR_COMPOSITE, SENSOR_ALL}:  # accepted without effect, as QEMU's does: there is no such sensor
        return
    features, smart = controller.features, controller.logs.smart
    before = smart.warnings(features)
    if threshold == THRESHOLD_OVER:
        features.temperature_over = command.cdw11 & 0xFFFF
    else:
        features.temperature_under = command.cdw11 & 0xFFFF
    notices.critical_warnings(controller, smart.warnings(features) & ~before)


def _set_number_of_queues(controller: Controller, command: Command) -> None:
    """Base 5.27.1.5: 65,535 is no number of queues, and once there are I/O queues it is too late."""
    if 0xFFFF in {command.cdw11 & 0xFFFF, command.cdw11 >> 16}:
        raise CommandError(Status.INVALID_FIELD)
    if len(controller.cqs) > 1 or len(controller.sqs) > 1:
        raise CommandError(Status.COMMAND_SEQUENCE_ERROR)


def _set_interrupt_coalescing(controller: Controller, command: Command) -> None:
    """Stored; the threshold and the time are the guest's hint (Base 5.27.1.6), and nothing is ever held back."""
    controller.features.interrupt_coalescing = command.cdw11 & 0xFFFF


def _set_vector_configuration(controller: Controller, command: Command) -> None:
    vector = _check_vector(controller, command.cdw11 & 0xFFFF)
    if vector == 0:  # never coalesced
        return
    if command.cdw11 & COALESCING_DISABLE:
        controller.features.coalescing_disabled.add(vector)
    else:
        controller.features.coalescing_disabled.discard(vector)


def _set_write_atomicity(controller: Controller, command: Command) -> None:
    controller.features.write_atomicity = command.cdw11 & 1


def _set_async_event(controller: Controller, command: Command) -> None:
    controller.features.async_event_configuration = command.cdw11


def _set_command_set_profile(_controller: Controller, command: Command) -> None:
    if command.cdw11 & 0x1FF:
        raise CommandError(Status.IO_COMMAND_SET_COMBINATION_REJECTED)


def _error_recovery_value(command: Command) -> int:
    """NVM 4.1.3.2: DULBE needs a disk that knows what is deallocated; Identify's NSFEAT does not offer it."""
    if command.cdw11 & ERROR_RECOVERY_DULBE:
        raise CommandError(Status.INVALID_FIELD)
    return int(command.cdw11) & 0xFFFF


class Definition(NamedTuple):
    """One feature with a value in dword 0. `set`: None where it cannot be changed."""

    current: Callable[[Controller, int], int]
    """From the controller and dword 11."""
    default: Callable[[Controller, int], int]
    set: Callable[[Controller, Command], None] | None = None


DEFINITIONS: dict[int, Definition] = {
    Feature.ARBITRATION: Definition(_no_limit, _no_limit),
    Feature.POWER_MANAGEMENT: Definition(_zero, _zero),
    Feature.TEMPERATURE_THRESHOLD: Definition(
        _temperature_threshold, _default_temperature_threshold, _set_temperature_threshold
    ),
    Feature.NUMBER_OF_QUEUES: Definition(_number_of_queues, _number_of_queues, _set_number_of_queues),
    Feature.INTERRUPT_COALESCING: Definition(_interrupt_coalescing, _zero, _set_interrupt_coalescing),
    Feature.INTERRUPT_VECTOR_CONFIGURATION: Definition(
        _vector_configuration, _default_vector_configuration, _set_vector_configuration
    ),
    Feature.WRITE_ATOMICITY: Definition(_write_atomicity, _zero, _set_write_atomicity),
    Feature.ASYNC_EVENT_CONFIGURATION: Definition(_async_event, _zero, _set_async_event),
    Feature.COMMAND_SET_PROFILE: Definition(_zero, _zero, _set_command_set_profile),
}
"""The features of the controller whose setting is done at once; the others have functions of their own below."""

_FIXED = {feature for feature, definition in DEFINITIONS.items() if definition.set is None}
_SIZES = {Feature.TIMESTAMP: TIMESTAMP.size, Feature.HOST_BEHAVIOR_SUPPORT: HOST_BEHAVIOR_SIZE}
"""Features whose value is a data structure, and its bytes."""


def get_features(controller: Controller, command: Command) -> None:
    """Get Features (Base 5.15)."""
    feature, select = command.cdw10 & 0xFF, command.cdw10 >> 8 & 7
    if feature not in set(Feature) or select not in set(Select):
        raise CommandError(Status.INVALID_FIELD)
    namespace = None
    if feature == Feature.ERROR_RECOVERY:
        check_nsid(command.nsid)
        namespace = controller.namespaces.require_active(command.nsid)
    if select == Select.SUPPORTED:
        scope = FEATURE_NAMESPACE if feature == Feature.ERROR_RECOVERY else 0
        command.complete(result=scope | (0 if feature in _FIXED else FEATURE_CHANGEABLE))
        return
    is_current = select == Select.CURRENT
    with controller.lock:
        result, data = _value(controller, command, feature, namespace, is_current)
    if data:
        command.write_data(data)
    command.complete(result=result)


def _value(
    controller: Controller, command: Command, feature: int, namespace: Namespace | None, is_current: bool
) -> tuple[int, bytes]:
    """Return dword 0 and the data of a feature's current or default value."""
    if definition := DEFINITIONS.get(feature):
        return (definition.current if is_current else definition.default)(controller, command.cdw11), b""
    if namespace is not None:
        return namespace.error_recovery if is_current else 0, b""
    if feature == Feature.VOLATILE_WRITE_CACHE:
        features = controller.features
        return features.volatile_write_cache if is_current else default_write_cache(controller.config), b""
    if not is_current:
        return 0, bytes(_SIZES[Feature(feature)])
    if feature == Feature.TIMESTAMP:
        return 0, _timestamp_data(controller)
    return 0, controller.features.host_behavior


def set_features(controller: Controller, command: Command) -> None:
    """Set Features (Base 5.27)."""
    feature = command.cdw10 & 0xFF
    if feature not in set(Feature):
        raise CommandError(Status.INVALID_FIELD)
    if command.cdw10 & FEATURE_SAVE:
        raise CommandError(Status.FEATURE_NOT_SAVEABLE)
    if feature == Feature.ERROR_RECOVERY:
        _set_error_recovery(controller, command)
        return
    if 1 <= command.nsid <= MAX_NAMESPACES:
        raise CommandError(Status.FEATURE_NOT_NAMESPACE_SPECIFIC)
    if command.nsid not in {0, ALL_NAMESPACES}:
        raise CommandError(Status.INVALID_NAMESPACE)
    if feature in _FIXED:
        raise CommandError(Status.FEATURE_NOT_CHANGEABLE)
    if feature == Feature.VOLATILE_WRITE_CACHE:
        _set_write_cache(controller, command)
        return
    if feature in _SIZES:
        _set_structure(controller, command, feature)
        return
    set_value = DEFINITIONS[feature].set
    assert set_value is not None
    with controller.lock:
        set_value(controller, command)
    command.complete(result=controller.features.number_of_queues if feature == Feature.NUMBER_OF_QUEUES else 0)


def _set_error_recovery(controller: Controller, command: Command) -> None:
    value = _error_recovery_value(command)
    with controller.lock:
        if command.nsid == ALL_NAMESPACES:
            chosen = controller.namespaces.active
        else:
            chosen = [controller.namespaces.require_active(command.nsid)]
        for namespace in chosen:
            namespace.error_recovery = value
    command.complete()


def _set_structure(controller: Controller, command: Command, feature: int) -> None:
    data = command.read_data(_SIZES[Feature(feature)])
    with controller.lock:
        if feature == Feature.TIMESTAMP:
            controller.features.host_timestamp(TIMESTAMP.unpack(data)[0])
        elif max(data[:3]) > 1 or any(data[3:]):  # each of ACRE, ETDAS, LBAFEE is 0 or 1
            raise CommandError(Status.INVALID_FIELD)
        else:
            controller.features.host_behavior = data
    command.complete()


def _set_write_cache(controller: Controller, command: Command) -> None:
    """Base 5.27.1.4: with the cache off every write is durable when it completes; so is, now, all that came before."""
    value = command.cdw11 & 1
    with controller.leases.suspended(), controller.lock:
        was_on = controller.features.volatile_write_cache
        controller.features.volatile_write_cache = value
    if value or not was_on:
        command.complete()
        return

    def flushed(failure: Failure | None) -> None:
        if failure is None:
            command.complete()
            return
        with controller.lock:
            controller.features.volatile_write_cache = was_on  # tried again, it has to flush again
        failures.backend_failed(controller, command, failure)

    writable = (namespace for namespace in controller.namespaces if not namespace.read_only)
    Batch(
        (Part(namespace.backend, Operation.FLUSH) for namespace in writable),
        flushed,
        ignores=lambda failure: failures.ignores(controller, failure),
    ).start()
