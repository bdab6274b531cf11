"""int8 graphs: which matrix products are quantised."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from loopitr.export.onnx_int8 import write_int8
from loopitr.export.onnx_running import onnx_session
from loopitr.export.onnx_smoothing import smoothed


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


def norm_and_products(rng, *, shared=False, given_out=False):
    """A layer norm with one channel that is far larger than the others, and two products of its output.

    With `given_out`, that output is one of the graph too, as of a text encoder without pooling.
    """
    gain = np.ones(16, np.float32)
    gain[3] = 60
    tensors = {"gain": gain, "bias": np.zeros(16, np.float32)}
    tensors |= {name: rng.normal(size=(16, 12)).astype(np.float32) for name in ("first", "second")}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "bias"], ["normed"], name="norm"),
        helper.make_node("MatMul", ["normed", "first"], ["a"], name="product_a"),
        helper.make_node("MatMul", ["normed" if not shared else "x", "first" if shared else "second"], ["b"], name="b"),
    ]
    given, *results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("x", 16), ("a", 12), ("b", 12), *([("normed", 16)] if given_out else []))
    ]
    weights = [numpy_helper.from_array(values, name=name) for name, values in tensors.items()]
    graph = helper.make_graph(nodes, "norm", [given], results, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_large_channel_costs_less_once_its_weights_take_it_over(tmp_path):
    rng = np.random.default_rng(0)
    onnx.save(norm_and_products(rng), tmp_path / "fp32.onnx")
    x, seen = (rng.normal(size=(64, 16)).astype(np.float32) for _ in range(2))
    write_int8(tmp_path / "fp32.onnx", tmp_path / "plain.onnx")
    write_int8(tmp_path / "fp32.onnx", tmp_path / "smoothed.onnx", [{"x": seen}])
    (tmp_path / "same.onnx").write_bytes(smoothed(tmp_path / "fp32.onnx", [{"x": seen}], []).SerializeToString())
    names = ("fp32", "same", "plain", "smoothed")
    right, same, *errors = [onnx_session(str(tmp_path / f"{name}.onnx")).run(["a", "b"], {"x": x}) for name in names]
    for index in range(2):
        assert np.abs(same[index] - right[index]).max() < 1e-4
        plain, better = (np.abs(own[index] - right[index]).mean() for own in errors)
        assert better < plain / 2


def test_weights_that_others_use_too_and_products_in_fp32_stay_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    onnx.save(norm_and_products(rng, shared=True), tmp_path / "shared.onnx")
    example = {"x": rng.normal(size=(4, 16)).astype(np.float32)}
    left = smoothed(tmp_path / "shared.onnx", [example], [])
    assert left == onnx.load(tmp_path / "shared.onnx")
    onnx.save(norm_and_products(rng), tmp_path / "fp32.onnx")
    kept = smoothed(tmp_path / "fp32.onnx", [example], ["b"]).graph
    assert {node.name: node.input[0] for node in kept.node}["b"] == "normed"
    assert {node.name: node.input[0] for node in kept.node}["product_a"] == "normed_smoothed"


def test_an_output_of_the_graph_stays_as_it_is(tmp_path):
    rng = np.random.default_rng(0)
    onnx.save(norm_and_products(rng, given_out=True), tmp_path / "fp32.onnx")
    x = rng.normal(size=(8, 16)).astype(np.float32)
    same = smoothed(tmp_path / "fp32.onnx", [{"x": x}], []).SerializeToString()
    for right, own in zip(*(onnx_session(graph).run(None, {"x": x}) for graph in (str(tmp_path / "fp32.onnx"), same))):
        assert np.abs(right - own).max() < 1e-4
