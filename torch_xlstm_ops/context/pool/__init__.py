"""The state pool: snapshots in device memory, host memory and a folder, found by the longest prefix of a prompt."""
