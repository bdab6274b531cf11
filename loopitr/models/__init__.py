"""The network: tensors in, tensors out, without losses and without communication between ranks."""
