"""JupyterLab's debugger, without a port."""
