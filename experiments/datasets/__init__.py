"""Questions of users: data files, folders, data sets on disk, and benchmarks by name."""
