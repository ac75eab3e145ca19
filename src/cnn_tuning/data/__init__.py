"""From bytes somewhere to packed, verified, split arrays and batches on the device."""
