"""perf model: is fuse() worth it for a model?"""
