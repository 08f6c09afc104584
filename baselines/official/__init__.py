"""Reference cases of the official implementations, replayed through the methods; the decoders some were recorded on."""
