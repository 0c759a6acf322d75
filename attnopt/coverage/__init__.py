"""Every architecture of transformers and diffusers, built small, optimised and measured; see docs/coverage.md."""
