"""Names of attention implementations, as transformers' configurations hold them."""

# Attention whose MatMuls go through quantizers (carsam.models.attention).
IMPLEMENTATION = "carsam"
# What a packed folder's config.json asks for. transformers without carsam knows no such attention, so it stops before
# it builds anything, with an error that quotes this text: our only words that a user can read then.
# It must not hold a slash, which transformers takes for a kernel to download.
NOTICE = "packed by carsam: pip install carsam, then import carsam before loading"
