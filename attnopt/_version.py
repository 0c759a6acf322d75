"""The version, in one place: read by the packaging, by kernel headers and by the cache."""

VERSION = "0.1.0"
