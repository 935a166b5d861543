"""Where workers' addresses come from: lists, files, Kubernetes."""
