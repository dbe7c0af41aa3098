"""What every `Device` does, as one story. Run by itself it tells it of CudaDevice."""

import json

import numpy as np

from headrace.serving.engine.device import ALIGNMENT_BYTES, Device
from headrace.serving.errors import DoesNotFit, EngineFault


def told(device: Device) -> dict[str, object]:
    """Use everything a device has; what came of it."""
    device.make_current()
    free, total = device.memory_bytes()
    stream = device.open_stream()
    first, second = device.allocate(1000), device.allocate(300)
    host = device.allocate_host(1024)
    source, target = host[:12].view(np.int32), host[512:524].view(np.int32)
    found: dict[str, object] = {
        "name": device.name,
        "capability": device.compute_capability,
        "aligned": (first % ALIGNMENT_BYTES, second % ALIGNMENT_BYTES),
        "taken": free - device.memory_bytes()[0],
        "total": total,
    }

    source[:] = [1, 2, 3]
    device.copy_to_device(first + 256, source, stream)
    device.copy_to_host(target, first + 256, stream)
    device.synchronize(stream)
    found["copied"] = target.tolist()

    device.begin_capture(stream)
    device.copy_to_device(second, source, stream)
    device.zero(second + 4, 4, stream)
    device.copy_to_host(target, second, stream)
    graph = device.end_capture(stream)
    device.synchronize(stream)
    source[:] = [7, 8, 9]
    for _ in range(2):
        device.launch(graph, stream)
        device.synchronize(stream)
    found["replayed"] = target.tolist()

    for kind, wrong in (
        (DoesNotFit, lambda: device.allocate(total)),
        (EngineFault, lambda: device.begin_capture(stream) or device.synchronize(stream)),
    ):
        try:
            wrong()
        except (kind, AssertionError) as error:
            found[kind.__name__] = isinstance(error, kind | AssertionError)

    device.free_graph(graph)
    for address in (first, second):
        device.free(address)
    del source, target
    device.free_host(host)
    device.close_stream(stream)
    found["left"] = total - device.memory_bytes()[0]
    device.close()
    device.close()
    return found


if __name__ == "__main__":
    from headrace.serving.engine.cuda_device import CudaDevice, capability_here

    assert capability_here() == "9.0"
    print(json.dumps(told(CudaDevice())))
