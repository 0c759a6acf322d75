"""Every architecture of transformers and diffusers, built small, optimised and measured; the figures of docs/coverage.md."""
