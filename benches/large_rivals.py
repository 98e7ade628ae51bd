"""The same fold as others' libraries do it: large_rivals.py onnx|onnx_ir INJECTED MERGED. See large_models.py.

Every `<module>.miss_block.default` of the injected model is added to `<module>.weight` (its rows repeated over the
inputs); the adapters' nodes are left in the graph, which costs these libraries nothing.
"""

import sys
from pathlib import Path

import numpy

BLOCK = ".miss_block.default"


def added(weight, block):
    """x · (W + tile(B)): row i takes row i mod r."""
    return (weight.reshape(-1, *block.shape) + block).reshape(weight.shape)


def with_onnx(source, target):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    tensors = {t.name: t for t in model.graph.initializer}
    for name, tensor in tensors.items():
        if name.endswith(BLOCK):
            weight = tensors[name[: -len(BLOCK)] + ".weight"]
            value = added(numpy_helper.to_array(weight), numpy_helper.to_array(tensor))
            weight.CopyFrom(numpy_helper.from_array(value, weight.name))
            tensor.Clear()
            tensor.CopyFrom(numpy_helper.from_array(numpy.zeros((), "float32"), name))
    # ByteSize fails on what is too large to be one file.
    if sum(len(t.raw_data) for t in tensors.values()) < 2**31 - 2**25:
        onnx.save(model, target)
    else:
        onnx.save(model, target, save_as_external_data=True, location=target.name + ".data")


def with_onnx_ir(source, target):
    import onnx_ir as ir

    model = ir.load(source)
    values = model.graph.initializers
    for name in [n for n in values if n.endswith(BLOCK)]:
        weight, block = values[name[: -len(BLOCK)] + ".weight"], values[name].const_value.numpy()
        stored = weight.const_value

        def make(stored=stored, block=block):
            return ir.tensor(added(stored.numpy(), block))

        weight.const_value = ir.LazyTensor(make, dtype=stored.dtype, shape=stored.shape, name=stored.name)
        values[name].const_value = ir.tensor(numpy.zeros((), "float32"), name=name)
    # It writes no single file of this size without holding all of it.
    ir.save(model, target, external_data=target.name + ".data")


if __name__ == "__main__":
    {"onnx": with_onnx, "onnx_ir": with_onnx_ir}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
