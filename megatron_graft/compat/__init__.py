"""Everything that depends on a version, an optional package or the absence of CUDA. Only this room probes."""
