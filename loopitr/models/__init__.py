"""The network: tensors in, tensors out. No loss and no collective lives here."""
