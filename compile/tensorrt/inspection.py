"""What a network consists of: part of every artifact, and the digest that names it.

Written from the INetworkDefinition, which is strongly typed: a layer computes in the types of its
tensors, and the builder may fuse layers but not change that. The engine's own inspector needs a
device; where one answers, the runtime's report says what the layers became.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from headrace.compile.tensorrt.network import Network

Inspection = Mapping[str, Any]
"""JSON: `summary` and `layers`, see `inspect`."""


def inspect(net: Network) -> Inspection:
    """Describe every layer.

    Returns:
        `layers`, each with name, type, precision, inputs, and outputs with dtype and shape; and
        `summary`: their number, how many of each type and precision, the attentions and how many
        of them must be fused, collectives, and the constants' bytes.
    """
    layers = list(_layers(net))
    attentions = list(_attentions(net))
    return {
        "summary": {
            "layers": len(layers),
            "types": dict(sorted(Counter(each["type"] for each in layers).items())),
            "precisions": dict(sorted(Counter(each["precision"] for each in layers).items())),
            "attentions": len(attentions),
            # A build of one that is not decomposable ends in a fused kernel or not at all.
            "fused_attentions": sum(not each.decomposable for each in attentions),
            "collectives": sum("collective" in each for each in layers),
            "constant_bytes": sum(values.nbytes for values in net.constants.values()),
        },
        "layers": layers,
    }


def digest(found: Inspection) -> str:
    """SHA-256 of the network's structure; constants' values are not in it."""
    text = json.dumps(found["layers"], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _layers(net: Network) -> Iterator[dict[str, Any]]:
    for index in range(net.definition.num_layers):
        layer = net.definition.get_layer(index)
        outputs = [layer.get_output(at) for at in range(layer.num_outputs)]
        inputs = [layer.get_input(at) for at in range(layer.num_inputs)]
        described: dict[str, Any] = {
            "name": layer.name,
            "type": layer.type.name,
            "precision": outputs[0].dtype.name if outputs else "none",
            "inputs": [None if each is None else each.name for each in inputs],
            "outputs": [
                {"name": each.name, "dtype": each.dtype.name, "shape": list(each.shape)}
                for each in outputs
            ],
        }
        if layer.type == net.trt.LayerType.DIST_COLLECTIVE:
            described |= json.loads(layer.metadata)
        yield described


def _attentions(net: Network) -> Iterator[Any]:
    for index in range(net.definition.num_layers):
        layer = net.definition.get_layer(index)
        if layer.type == net.trt.LayerType.ATTENTION_OUTPUT:
            # The bindings answer the base class; the object is what its type says.
            layer.__class__ = net.trt.IAttentionOutputLayer
            yield layer.attention
