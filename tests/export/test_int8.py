"""int8 graphs: which matrix products are quantised."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from loopitr.export.onnx_files import write_int8


def chain_of(shapes):
    """A graph of matrix products with weights of these shapes, each named by its shape."""
    weights, nodes, last = [], [], "x"
    for rows, columns in shapes:
        name = f"{rows}to{columns}"
        values = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name=f"{name}_weight"))
        nodes.append(helper.make_node("MatMul", [last, f"{name}_weight"], [name], name=name))
        last = name
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("x", shapes[0][0]), (last, shapes[-1][1]))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_products_to_half_their_width_or_less_stay_in_fp32(tmp_path):
    onnx.save(chain_of([(8, 32), (32, 8), (8, 6), (6, 3)]), tmp_path / "chain.onnx")
    write_int8(tmp_path / "chain.onnx", tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    kept = {node.name for node in graph.node if node.op_type == "MatMul"}
    assert kept == {"32to8", "6to3"}
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 2
