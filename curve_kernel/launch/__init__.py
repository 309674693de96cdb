"""Starting kernels with keys."""
