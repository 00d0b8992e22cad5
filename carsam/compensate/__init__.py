"""What changes a layer to cancel the error of quantization: MAC, the ridge refit, the spread of outputs."""
