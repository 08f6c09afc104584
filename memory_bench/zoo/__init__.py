"""Where backbones come from: named ones, GGUF files, the one that is trained here, released ones."""
