"""Exports of trained models: the dual encoder or one tower, ONNX, sentence-transformers."""
